"""What a file is like, found by decoding all of it."""

import contextlib
import hashlib
import io

from vidjoint.data.decode import DecodeError, open_regular
from vidjoint.data.files import has_extension
from vidjoint.data.image import read_image
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video

SIDE = 8  # pixels; frames are decoded whole, then shrunk to this


def kind_of(name: str) -> str:
    """The medium that an extension tells; a GIF counts as a video, and so does what has no known extension."""
    return "image" if has_extension(name, "image") and not has_extension(name, "video") else "video"


def facts_of(content: str | bytes, media: str) -> dict:
    """Decodes all of a file: every frame that any clip of it could show. Returns what it is like, with a digest of its bytes.

    Raises:
      DecodeError: some of it can't be decoded.
    """
    digest = hashlib.blake2b(digest_size=16)
    with contextlib.nullcontext(io.BytesIO(content)) if isinstance(content, bytes) else open_regular(content) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if media == "image":
        seen = []

        def whole(height, width):
            seen.append(f"{width}x{height}")
            return Geometry((height, width), 0, 0, height, width)

        read_image(content, whole)
        return {"digest": digest.digest(), "media": "image", "size": seen[0]}
    with Video(content) as video:
        info = video.info
        for _ in video.frames(SIDE, SIDE):
            pass
        if 2 * video.decoded < info.frames:
            raise DecodeError(f"it ends early: {video.decoded} frames of the {info.frames} that it claims")
    facts = {"duration": round(info.duration, 3), "fps": round(info.fps, 3), "frames": info.frames}
    return {"digest": digest.digest(), "media": "video", "size": f"{info.width}x{info.height}", **facts}
