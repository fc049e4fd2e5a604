"""vLLM's AsyncLLM in this process, with its core in a child.

Known upstream, and avoided here: `dtype="auto"` turns float32 checkpoints into float16 (it is always set); a
request of exactly max_model_len tokens never ends (max_model_len is one above the longest input); shutdown
with requests in flight leaves their callers waiting for ever (they are cancelled first).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import vllm
from vllm import PoolingParams
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

from lift_cache.errors import EngineUnavailable
from lift_cache.recipe import Recipe

POOLING: dict[str, Literal["CLS", "LAST", "MEAN"]] = {"cls": "CLS", "last": "LAST", "mean": "MEAN"}

_STARTER = ThreadPoolExecutor(1, thread_name_prefix="engine-start")
# The kernel delivers a child's parent-death signal when the *thread* that spawned it ends, so the child is
# spawned by a thread that lives as long as the process; starting there also leaves the event loop free to
# answer hits for the half minute that loading takes.


class VllmEngine:
    """See `Engine`."""

    verified = True

    def __init__(self, model: Path, recipe: Recipe, *, batch_tokens: int) -> None:
        self.recipe = recipe
        self._arguments: dict[str, Any] = {
            "model": str(model),
            "runner": "pooling",
            "dtype": recipe.dtype,
            "enforce_eager": not torch.cuda.is_available(),  # there is nothing to capture on a CPU
            "max_model_len": recipe.max_tokens + 1,
            "max_num_batched_tokens": max(batch_tokens, recipe.max_tokens + 1),
            # Whole prompts, computed afresh: what shares a batch must not show in a vector.
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "distributed_executor_backend": None if torch.cuda.is_available() else "uni",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "pooler_config": PoolerConfig(
                seq_pooling_type=POOLING[recipe.pooling], use_activation=recipe.normalize
            ),
        }
        self._parameters = PoolingParams(task="embed", use_activation=recipe.normalize)
        self._starting: Future[AsyncLLM] | None = None
        self._llm: AsyncLLM | None = None
        self._waiting: set[asyncio.Task[np.ndarray]] = set()
        self._number = itertools.count()

    async def start(self) -> None:
        self._starting = _STARTER.submit(self._build)
        try:
            self._llm = await asyncio.wrap_future(self._starting)
        except Exception as error:
            raise EngineUnavailable(f"vLLM did not start: {_one_line(error)}") from error
        built = self._llm.vllm_config.model_config
        if str(built.dtype) != f"torch.{self.recipe.dtype}":
            await self.aclose()
            raise EngineUnavailable(
                f"vLLM loaded the model as {built.dtype}; the recipe says {self.recipe.dtype}"
            )

    def _build(self) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))
        # What importing and loading made stays. Collections would walk all of it while requests wait; vLLM's own
        # server does the same. Thawed first, so that an engine before this one is collected.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        return llm

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        if self._llm is None:
            raise EngineUnavailable("vLLM is not running")
        tasks = [asyncio.ensure_future(self._embed_one(ids)) for ids in inputs]
        self._waiting.update(tasks)
        try:
            return np.stack(await asyncio.gather(*tasks))
        except asyncio.CancelledError:
            if self._llm is None:  # closed under us, not cancelled by the caller
                raise EngineUnavailable("vLLM was stopped") from None
            raise
        except Exception as error:
            raise EngineUnavailable(f"vLLM failed: {_one_line(error)}") from error
        finally:
            for task in tasks:
                task.cancel()
            self._waiting.difference_update(tasks)

    async def _embed_one(self, ids: list[int]) -> np.ndarray:
        assert self._llm is not None
        prompt = TokensPrompt(prompt_token_ids=ids)
        async for output in self._llm.encode(prompt, self._parameters, f"caption-{next(self._number)}"):
            return np.asarray(output.outputs.data.float().numpy(), np.float32)
        raise EngineUnavailable("vLLM ended a request without an answer")

    def healthy(self) -> bool:
        return self._llm is not None and not self._llm.errored

    async def aclose(self) -> None:
        llm, self._llm = self._llm, None
        if llm is None and self._starting is not None:
            llm = await self._given_up(self._starting)
        self._starting = None
        for task in self._waiting:
            task.cancel()
        if llm is not None:
            with contextlib.suppress(Exception):
                await asyncio.get_running_loop().run_in_executor(_STARTER, llm.shutdown)

    async def _given_up(self, starting: Future[AsyncLLM]) -> AsyncLLM | None:
        """End a start that is under way; returns the engine when it was faster.

        Loading cannot be interrupted, and this process cannot end before it; it fails at once without its child.
        """
        while not starting.done():
            for child in multiprocessing.active_children():  # nothing else here uses multiprocessing
                child.kill()
            await asyncio.sleep(0.05)
        return None if starting.cancelled() or starting.exception() else starting.result()

    def describe(self) -> dict[str, str]:
        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
