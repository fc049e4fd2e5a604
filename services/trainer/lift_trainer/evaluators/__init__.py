"""What a trained image encoder can do, task by task.

    data of a task ┐
    encoder        ┴→ evaluator → Result (scores, every item's outcome, what was left out)
                        → RUN/eval/TASK-NAME-PROTOCOL.json

An evaluator is opened once with its data and then asked about one encoder after another; see `protocol.py`.
"""
