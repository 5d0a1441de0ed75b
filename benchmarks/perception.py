"""How precisely does a policy's frozen prefix know where the block is?

    python benchmarks/perception.py [--policy-path tiny] [--block-radius-range .15 .32 --block-angle-deg 60 ...]
    python benchmarks/perception.py --quick

Online RL leaves the prefix as it is: what vision tower and language model do not tell the action expert, no amount of
training brings back. A ridge regression reads the block's place off the state token's last hidden state at the start
of an episode; the table gives its error on scenes it was not fitted to, by distance and by direction. Run it before and
after a supervised stage: one that trains the prefix on few demonstrations can forget what pre-training taught it.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from _common import Row, make_parser, report
from numpy.typing import NDArray
from torch import Tensor

from reinflow_so101.opening import make_policy
from so101_sim.scene import PickScene
from so101_sim.vector.make import make_vector_env
from train_reinflow import PRESETS, TrainingConfig

BATCH, BINS = 64, 6
RIDGES = (3.0, 30.0, 300.0, 3000.0)


def through_video(images: NDArray[np.uint8], crf: int, pix_fmt: str) -> NDArray[np.uint8]:
    """Images (N, h, w, 3) as they come back from h264 with a keyframe in two, as LeRobot's data sets have them."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as written:
        stream: Any = written.add_stream("libx264", rate=50, options={"crf": str(crf), "g": "2"})
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], pix_fmt
        for image in images:
            written.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")))
        written.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as read:
        frames = [frame.to_ndarray(format="rgb24") for frame in read.decode(video=0)]
    return np.stack(frames)


def scenes(config: TrainingConfig, count: int, video: tuple[int, str] | None = None) -> tuple[Tensor, Tensor]:
    """Prefix features (M, F) and block positions (M, 2) in metres of `count` starts, seeds 0, 1, ...

    `video`: crf and pixel format of h264 that the images go through first.
    """
    policy = make_policy(config, "cpu")
    features, places, layout = [], [], PickScene(config.env()).layout
    with make_vector_env(config.env(), BATCH) as env, torch.no_grad():
        for first in range(0, count, BATCH):
            observation = env.reset(range(first, first + BATCH))
            if video:
                pixels = {name: through_video(images, *video) for name, images in observation["pixels"].items()}
                observation = {**observation, "pixels": pixels}
            features.append(policy.encode(policy.preprocess(observation))["features"])
            places.append(torch.from_numpy(layout.scene_state(env.get_state()["rows"]).block_pos[:, :2].copy()))
    return torch.cat(features).double(), torch.cat(places)


def ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Weights (F, 2) of a ridge regression."""
    gram = features.T @ features + strength * torch.eye(features.shape[1], dtype=features.dtype)
    return torch.linalg.solve(gram, features.T @ targets)


def held_out_errors(features: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Errors (m,) in metres on the last sixth of the scenes, and where these are; the ridge is chosen on the fifth."""
    fitted, chosen = len(features) * 4 // 6, len(features) * 5 // 6
    mean, std = features[:fitted].mean(0), features[:fitted].std(0) + 1e-6
    inputs = torch.cat([(features - mean) / std, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
    weights = [ridge(inputs[:fitted], places[:fitted], strength) for strength in RIDGES]
    errors = [(inputs @ w - places).norm(dim=1) for w in weights]
    best = min(errors, key=lambda e: float(e[fitted:chosen].median()))
    return best[chosen:], places[chosen:]


def by_bin(what: str, values: Tensor, errors: Tensor) -> list[Row]:
    """A row per bin of `values`."""
    edges = torch.linspace(float(values.min()), float(values.max()) + 1e-9, BINS + 1, dtype=values.dtype)
    rows: list[Row] = []
    for low, high in pairwise(edges.tolist()):
        inside = errors[(values >= low) & (values < high)]
        if len(inside):
            rows.append(row(f"{what} {low:.3g} to {high:.3g}", inside))
    return rows


def row(where: str, errors: Tensor) -> Row:
    """Median and 90 % quantile in mm."""
    median, most = (1000 * float(errors.quantile(q)) for q in (0.5, 0.9))
    return {"block": where, "scenes": len(errors), "median mm": median, "90 % mm": most}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--policy-path", default="tiny", help="a SmolVLA policy directory")
    parser.add_argument("--block-radius-range", type=float, nargs=2, default=PRESETS["tiny"].block_radius_range)
    parser.add_argument("--block-angle-deg", type=float, default=PRESETS["tiny"].block_angle_deg)
    parser.add_argument("--block-yaw-deg", type=float, default=PRESETS["tiny"].block_yaw_deg)
    parser.add_argument("--scenes", type=int, default=3_840)
    parser.add_argument(
        "--crf", type=int, help="h264 quality that the images go through first: LeRobot's default is 30"
    )
    parser.add_argument("--pix-fmt", default="yuv420p", help="its pixel format; yuv444p keeps the colours' resolution")
    args = parser.parse_args(argv)
    config = dataclasses.replace(
        PRESETS["tiny"],
        pretrained_path=args.policy_path,
        block_radius_range=tuple(args.block_radius_range),
        block_angle_deg=args.block_angle_deg,
        block_yaw_deg=args.block_yaw_deg,
    )
    video = None if args.crf is None else (args.crf, args.pix_fmt)
    errors, places = held_out_errors(*scenes(config, 384 if args.quick else args.scenes, video))
    rows = [row("all", errors), *by_bin("r in m:", places.norm(dim=1), errors)]
    rows += by_bin("angle in deg:", torch.rad2deg(torch.atan2(places[:, 0], places[:, 1])), errors)
    report(rows, args, f"policy {args.policy_path}")


if __name__ == "__main__":
    main()
