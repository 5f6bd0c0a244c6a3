"""Videos as files, through PyAV (FFmpeg)."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing
from ..pixels import MOST_PIXELS, to_bytes


def write(video: Tensor, path: Path, fps: float) -> None:
    """[F, H, W, 3] in 0..1 as an mp4: H.264, 4:2:0, which every player knows. An odd last row or column is repeated once: 4:2:0 has none."""
    with replacing(path) as beside:
        _encode(video, str(beside), fps, 17, {"movflags": "+faststart"})


def encoded(video: Tensor, fps: float, crf: int = 10) -> bytes:
    """The same as a file's bytes, to be looked at by a program: of better quality. crf: x264's, lower is better."""
    file = io.BytesIO()
    _encode(video, file, fps, crf)
    return file.getvalue()


def _encode(video: Tensor, file: str | io.BytesIO, fps: float, crf: int, options: dict[str, str] | None = None) -> None:
    import av

    frames = to_bytes(video)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(file, "w", format="mp4", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read(path: Path) -> tuple[Tensor, float]:
    """Frames [F, H, W, 3] float32 in 0..1, and frames a second."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return torch.from_numpy(frames).float() / 255, float(stream.average_rate)


def decoded(data: bytes) -> Tensor:
    """Frames [F, H, W, 3] float32 in 0..1 of an mp4 from elsewhere. Raises `ValueError`, in words, for one that is none, or of more than `MOST_PIXELS`."""
    import av

    frames, pixels = [], 0
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            for frame in container.decode(container.streams.video[0]):
                pixels += frame.width * frame.height
                if pixels > MOST_PIXELS:
                    raise ValueError(f"found a video of more than {MOST_PIXELS} pixels in all frames, which is the most that is accepted")
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, IndexError):
        raise ValueError("found what is not an MP4 file, or a broken one") from None
    if not frames:
        raise ValueError("found an MP4 file without frames")
    return torch.from_numpy(np.stack(frames)).float() / 255
