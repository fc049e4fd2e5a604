"""transformers in this process: models that vLLM does not serve, and machines without vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModel

from lift_cache.errors import EngineUnavailable
from lift_cache.recipe import Recipe


class TransformersEngine:
    """See `Engine`. Computes in one thread of its own; on a GPU when there is one."""

    verified = True

    def __init__(self, model: Path, recipe: Recipe, *, batch_tokens: int) -> None:
        self.recipe = recipe
        self._folder = model
        self._batch_tokens = batch_tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._model: Any = None

    async def start(self) -> None:
        try:
            self._model = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except Exception as error:
            raise EngineUnavailable(
                f"transformers did not load the model: {' '.join(str(error).split())}"
            ) from error

    def _load(self) -> Any:
        model = AutoModel.from_pretrained(
            self._folder,
            dtype=getattr(torch, self.recipe.dtype),
            local_files_only=True,
            trust_remote_code=self.recipe.code_revision is not None,
        )
        return model.eval().requires_grad_(False).to(self._device)

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        model = self._model
        if model is None:
            raise EngineUnavailable("the model is not loaded")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, model, inputs)
        except asyncio.CancelledError:
            if self._model is None:  # closed under us, not cancelled by the caller
                raise EngineUnavailable("the engine was stopped") from None
            raise
        except Exception as error:
            if self._model is None:
                raise EngineUnavailable("the engine was stopped") from error
            if isinstance(error, RuntimeError):  # out of memory, a lost device
                raise EngineUnavailable(f"transformers failed: {' '.join(str(error).split())}") from error
            raise

    def _embed(self, model: Any, inputs: Sequence[list[int]]) -> np.ndarray:
        vectors = np.empty((len(inputs), self.recipe.dimensions), np.float32)
        for rows in batches(inputs, self._batch_tokens):
            vectors[rows] = self._forward(model, [inputs[row] for row in rows])
        return vectors

    @torch.inference_mode()
    def _forward(self, model: Any, batch: list[list[int]]) -> np.ndarray:
        lengths = torch.tensor([len(ids) for ids in batch])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        # Padding is on the right and masked: its id is never read, so 0 needs no padding token.
        ids = torch.zeros(mask.shape, dtype=torch.long)
        ids[mask] = torch.tensor([token for row in batch for token in row])
        ids, mask, lengths = ids.to(self._device), mask.to(self._device), lengths.to(self._device)
        if self.recipe.pooling == "model":
            pooled = model(input_ids=ids, attention_mask=mask.long(), pool_mask=mask.long())
            vectors = pooled["sentence_embeddings"].reshape(len(batch), -1)
        else:
            states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            vectors = pool(states, mask, self.recipe.pooling)
        vectors = vectors.float()
        if self.recipe.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu().numpy()

    def healthy(self) -> bool:
        return self._model is not None

    async def aclose(self) -> None:
        self._model = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> dict[str, str]:
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
        }


def pool(states_btd: torch.Tensor, mask_bt: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token states to one vector [B, D] per text; texts are padded on the right.

    Sums in float32: a mean in bfloat16 loses bits with every token.
    """
    if pooling == "cls":
        return states_btd[:, 0]
    if pooling == "last":
        last_b = mask_bt.sum(1) - 1
        return states_btd[torch.arange(len(states_btd), device=states_btd.device), last_b]
    weights_bt1 = mask_bt[:, :, None].float()
    return (states_btd.float() * weights_bt1).sum(1) / weights_bt1.sum(1)


def batches(inputs: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Rows in batches of at most `tokens` padded tokens (or one row), long ones together: less padding."""
    batch: list[int] = []
    for row in sorted(range(len(inputs)), key=lambda row: -len(inputs[row])):
        if batch and len(inputs[batch[0]]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
