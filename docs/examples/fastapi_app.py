"""A small HTTP service: the picture is the body of the request, the answer is streamed.

    LLAVA_EDGE_ARTIFACT=my-artifact uvicorn fastapi_app:app
    curl --data-binary @receipt.jpg 'http://127.0.0.1:8000/ask?question=What+is+the+total'

Requests queue in the model, first in, first out. Prefix reuse is off because several users share
the model, and the time of an answer would reveal what another user sent.

Needs: pip install './llava-edge[cpu]' fastapi uvicorn
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from llava_edge.runtime import ImageError, LlavaEdge, PromptError, RequestError

MOST_BYTES = 20 << 20


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with LlavaEdge.load(os.environ["LLAVA_EDGE_ARTIFACT"], prefix_reuse=False) as model:
        app.state.model = model
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/ask")
async def ask(request: Request, question: str) -> StreamingResponse:
    picture = bytearray()
    async for chunk in request.stream():
        picture += chunk
        if len(picture) > MOST_BYTES:
            raise HTTPException(413, f"the picture is larger than {MOST_BYTES} bytes")
    try:
        # Checking and cutting a picture takes processor time: not on the event loop.
        pieces = await run_in_threadpool(
            app.state.model.stream, question, [bytes(picture)], deadline_seconds=120.0
        )
    except (ImageError, PromptError, RequestError) as error:
        raise HTTPException(422, str(error)) from error

    def body() -> Iterator[str]:
        # Closing the stream frees its work at the next token, also when the client goes away.
        with pieces:
            yield from pieces

    return StreamingResponse(body(), media_type="text/plain")
