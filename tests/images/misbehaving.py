"""A preparation that misbehaves as the row's text says. Image workers load it in their own processes."""

import os
import signal
import time


class Misbehaving:
    def __init__(self):
        self.previous = self.pixels = None

    def prepare(self, request, images, infos=()):
        text = request.messages[0].parts[0].text or ""
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("die once "):
            try:
                os.mkdir(text.removeprefix("die once "))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGSEGV)
        if text.startswith("hang "):
            open(text.removeprefix("hang "), "w").close()
            time.sleep(600)
        if text == "raise":
            raise RuntimeError("by order")
        if text == "use 1 TiB":
            return {"a": bytearray(1 << 40)}
        if text == "environment":
            return {"environment": repr(sorted(os.environ)).encode()}
        if text.startswith("large "):
            return {"large": bytes(int(text.removeprefix("large ")))}
        if images is not self.previous:
            self.previous, self.pixels = images, b"".join(image.tobytes() for image in images)
        return {"number": request.row.to_bytes(8, "little"), "pixels": self.pixels}


class Halving(Misbehaving):
    def resized_size(self, width, height):
        return 16, 8


def broken():
    raise ImportError("no such library")
