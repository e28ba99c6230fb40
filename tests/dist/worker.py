"""One torchrun rank: runs the cases of DIR/cases.json, writes DIR/rankR.jsonl.

Cases of one layout share its process groups (Megatron makes about 25, each with threads of its own
that gloo keeps while anything refers to the group). Each case ends with a barrier, so all ranks
pass it or all fail it; after a failure the groups are torn down and the next case gets new ones,
over a store of its own, so that a case that got out of step cannot reach the next.

`DIR/..` holds the reference models and batches.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from harness import CASE_LIMIT_S, CASES, Case, Layout
from workbench import Workbench


def set_up(layout: Layout, store: Path, data: Path) -> Workbench:
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=timedelta(seconds=CASE_LIMIT_S),
    )
    return Workbench(layout, data)


def tear_down() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # gloo's sockets close with the last reference: peers then fail at once


def run_case(case: Case, bench: Workbench) -> str | None:
    """None, or the traceback."""
    try:
        case.function(bench, **case.arguments)
        dist.barrier()
        return None
    except Exception:
        return traceback.format_exc()


def main() -> None:
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    bench: Workbench | None = None
    with (work / f"rank{os.environ['RANK']}.jsonl").open("w") as results:
        for index, name in enumerate(json.loads((work / "cases.json").read_text())):
            importlib.import_module(name.partition(":")[0])
            case, start = CASES[name], time.monotonic()
            faulthandler.dump_traceback_later(CASE_LIMIT_S, exit=True)
            if bench is not None and bench.layout != case.layout:
                bench = None
                tear_down()
            if bench is None:
                bench = set_up(case.layout, work / f"store{index}", work.parent)
            bench.figures = {}
            error = run_case(case, bench)
            if error:
                bench = None
                tear_down()
            faulthandler.cancel_dump_traceback_later()
            result = {
                "case": name,
                "error": error,
                "seconds": round(time.monotonic() - start, 2),
                "figures": bench.figures if bench is not None else {},
            }
            print(f"{name}: {'FAILED' if error else 'ok'} {result['seconds']} s", flush=True)
            results.write(json.dumps(result) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
