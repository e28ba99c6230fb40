"""A rank for test_megatron_loop.py: `loop_ranks.py DIR` runs the scripts of DIR/runs.json in turn.

Each run is (name, file, arguments of its `main`); DIR/rankR.json gets, by name, what it printed and
a digest of every model param of this rank.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(directory: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init = dist.init_process_group
    results = {}
    for index, (name, file, arguments) in enumerate(
        json.loads((directory / "runs.json").read_text())
    ):
        # A store of its own: in torchrun's, this run would read the last one's addresses and hang.
        store = dist.FileStore(str(directory / f"store{index}"), world)
        dist.init_process_group = partial(init, store=store, rank=rank, world_size=world)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            model = runpy.run_path(file)["main"](arguments)
        results[name] = {"printed": printed.getvalue(), "digest": digest(model)}

        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        del model
        gc.collect()
    (directory / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
