"""What bench/server.py measures the server against, each in a process of its own.

direct MODEL        vLLM's AsyncLLM with the server's arguments and batches, without HTTP, tokenizer and cache;
                    a list of captions as JSON on a line in, {"seconds", "cpu"} on a line out
echo PORT ANSWER    a bare FastAPI route that reads a body and sends a file's bytes
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response

from lift_embedder import models
from lift_embedder.path import WORKERS
from lift_embedder.queue import Queue, Wanted
from lift_embedder.recipes import RecipeOptions, build_recipe
from lift_embedder.runtime import prepare_for_engine
from lift_embedder.server import bind
from lift_embedder.tokens import CaptionTokenizer

BATCH_TOKENS = 8192


async def direct(name: str) -> None:
    """Load the model, then embed what comes in, until the input ends."""
    prepare_for_engine()
    from vllm.inputs import TokensPrompt

    from lift_embedder.engines.vllm_engine import VllmEngine

    model = models.resolve(name)
    recipe = build_recipe(model.named, model.name, model.facts, RecipeOptions())
    tokenizer = CaptionTokenizer(recipe, models.load_tokenizer(model))
    engine = VllmEngine(model.folder, recipe, batch_tokens=BATCH_TOKENS)
    await engine.start()
    llm, parameters = engine._llm, engine._parameters  # as the server starts it, without what it puts around
    assert llm is not None
    answers = os.fdopen(os.dup(1), "w")  # print is the engine's, too

    async def one(ids: list[int], number: str) -> Any:
        async for output in llm.encode(TokensPrompt(prompt_token_ids=ids), parameters, number):
            return output.outputs.data

    async def worker(queue: Queue) -> None:
        while len(queue):
            await asyncio.gather(*(one(row.tokens.ids, row.key.decode()) for row in await queue.batch()))

    print(json.dumps({"ready": True}), file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        queue = Queue(most_tokens=1 << 40, most_bytes=1 << 40, batch_tokens=BATCH_TOKENS)
        loop = asyncio.get_running_loop()
        rows = enumerate(tokenizer(json.loads(line)))
        queue.add([Wanted(b"%d" % i, None, tokens, loop.create_future(), bulk=True) for i, tokens in rows])
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(worker(queue) for _ in range(WORKERS)))
        taken = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps(taken), file=answers, flush=True)
    await engine.aclose()


def echo(port: int, answer: bytes) -> None:
    """Serve on the settings that the server runs with."""
    app = FastAPI()

    @app.post("/echo")
    async def bare(request: Request) -> Response:
        await request.body()
        return Response(answer, media_type="application/json")

    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, ws="none")
    uvicorn.Server(config).run(sockets=[bind("127.0.0.1", port)])


if __name__ == "__main__":
    if sys.argv[1] == "direct":
        uvloop.run(direct(sys.argv[2]))
    else:
        echo(int(sys.argv[2]), Path(sys.argv[3]).read_bytes())
