"""Videos as files, through PyAV (FFmpeg)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing
from ..pixels import to_bytes


def write(video: Tensor, path: Path, fps: float) -> None:
    """[F, H, W, 3] in 0..1 as an mp4: H.264, 4:2:0, which every player knows. An odd last row or column is repeated once: 4:2:0 has none."""
    import av

    frames = to_bytes(video)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with replacing(path) as beside, av.open(str(beside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
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
