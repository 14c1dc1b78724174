"""A preparation whose conduct the row's text orders. Loaded by image workers in their own processes."""

import os
import signal
import time


class Misbehaving:
    seen = pixels = None

    def prepare(self, request, pictures, images=()):
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
        if text == "hang":
            time.sleep(60)
        if text == "raise":
            raise RuntimeError("by order")
        if text == "gorge":
            return {"a": bytearray(1 << 40)}
        if text == "environment":
            return {"environment": repr(sorted(os.environ)).encode()}
        if text.startswith("large "):
            return {"large": bytes(int(text.removeprefix("large ")))}
        if pictures is not self.seen:
            self.seen, self.pixels = pictures, b"".join(picture.tobytes() for picture in pictures)
        return {"number": request.row.to_bytes(8, "little"), "pixels": self.pixels}


class Halving(Misbehaving):
    def used(self, width, height):
        return 16, 8


def broken():
    raise ImportError("no such library")
