"""Correct answers: the shapes model sees what was drawn, however the image is given."""

import asyncio
import base64
import io
import random
import threading
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

import batchvl
from batchvl.shapes.scenes import ask_about, ask_about_pair, draw_scene, make_scene

ROWS = 240
KINDS = ("caption", "count", "colour", "background", "is_there")
WAYS = ("path", "data", "bytes", "http")


@contextmanager
def serving(images: dict[str, bytes]):
    """Run a web server on the loopback address, in a thread. Yield its address."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    address: list[str] = []

    async def serve() -> None:
        async def image(request: web.Request) -> web.Response:
            await asyncio.sleep(random.random() * 0.02)  # so that the images arrive in another order
            return web.Response(body=images[request.match_info["name"]], content_type="image/png")

        app = web.Application()
        app.router.add_get("/{name}", image)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw(rng, scene, tiled=False) -> bytes:
    size = rng.choice([(224, 112), (112, 224), (224, 224)]) if tiled else (144, 144)
    return png(draw_scene(scene, *size, rng))


def conversation(rng):
    """Return images, prompts and the correct answers of one row."""
    kind = rng.random()
    if kind < 0.3:
        scenes = make_scene(rng), make_scene(rng)
        question, answer = ask_about_pair(*scenes, rng)
        return [draw(rng, scene) for scene in scenes], [question], [answer]
    scene = make_scene(rng)
    asked = [q for q in (ask_about(scene, k, rng) for k in rng.sample(KINDS, 3)) if q]
    if kind < 0.7:
        asked = asked[:1]
    tiled = len(asked) == 1 and asked[0][1] == ask_about(scene, "caption", rng)[1]
    return [draw(rng, scene, tiled)], [q for q, _ in asked], [a for _, a in asked]


@pytest.mark.timeout(300)
def test_every_row_gets_its_own_correct_answer(tmp_path):
    rng = random.Random("truth")
    served: dict[str, bytes] = {}
    rows, truth = [], []
    with serving(served) as address:
        for number in range(ROWS):
            files, questions, answers = conversation(rng)
            images = []
            for i, data in enumerate(files):
                name, way = f"{number}-{i}.png", rng.choice(WAYS)
                if way == "path":
                    (tmp_path / name).write_bytes(data)
                    images.append({"bytes": None, "path": name})
                elif way == "http":
                    served[name] = data
                    images.append({"bytes": None, "path": f"{address}/{name}"})
                elif way == "data":
                    images.append({"bytes": None, "path": "data:image/png;base64," + base64.b64encode(data).decode()})
                else:
                    images.append({"bytes": data, "path": None})
            rows.append({"id": f"row {number}", "prompt": questions, "images": images})
            truth.append(answers)
        order = list(range(ROWS))
        rng.shuffle(order)
        pq.write_table(pa.Table.from_pylist([rows[i] for i in order]), tmp_path / "m.parquet")
        summary = batchvl.run(
            str(tmp_path / "m.parquet"),
            model="shapes",
            engine="transformers",
            quiet=True,
            number_images=True,
            allow_private="127.0.0.0/8",
            batch_size=16,
            max_new_tokens=48,
        )
    assert summary.exit_code == 0, summary
    results = pq.read_table(summary.results).to_pylist()
    assert [r["id"] for r in results] == [f"row {i}" for i in order]
    wrong = [
        (r["id"], got, want)
        for r, i in zip(results, order, strict=True)
        if (got := r["responses"] or [r["response"]]) != (want := truth[i])
    ]
    assert not wrong
