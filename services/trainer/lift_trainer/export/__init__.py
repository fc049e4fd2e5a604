"""Trained image encoders as other libraries load them: timm, open_clip, transformers, ONNX.

    run → source (what is exported) → a folder in one library's layout → loaded back and compared → published

Every folder holds, beside the weights, the text transform, `lift.json` (pixel statistics, recipe and its
fingerprint, how it was trained) and a model card. Nothing here needs a network.
"""
