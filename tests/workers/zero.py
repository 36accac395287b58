"""Trains by DeepSpeed's ZeRO and without it; rank 0 writes how they differ. Not a test by itself."""

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from mtl.data.batching import Batch
from mtl.distributed import Distributed
from mtl.gradients import Backward, attach
from mtl.surgery import PCGrad
from mtl.zero import ZeroOptimizer, shard_frozen

spec = importlib.util.spec_from_file_location("cut_anyhow", Path(__file__).parent / "cut_anyhow.py")
cases = importlib.util.module_from_spec(spec)
sys.modules["cut_anyhow"] = cases
spec.loader.exec_module(cases)
NUM_STEPS, RESTART = 6, 3


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(accelerator, layout_name, stage, restart=False):
    """The rows of the first step, and parameters and moments after a few steps with PCGrad."""
    os.environ.pop("MTL_ZERO_STAGE", None)
    if stage is not None:
        os.environ["MTL_ZERO_STAGE"] = str(stage)
    distributed = Distributed(accelerator)
    model, layout = cases.make(layout_name, torch.float32)
    model = distributed.place(model, layout.parameters())

    def make():
        if stage in (0, 1, 2):
            return ZeroOptimizer(adamw, layout, distributed, stage=stage)
        return adamw(layout.parameters())

    if stage == 3:
        shard_frozen(model, layout, distributed)
        gc.collect()
        assert all(p.numel() == 0 for p in model.parameters() if not p.requires_grad)
    optimizer, surgery = make(), PCGrad(seed=0)
    absent_moved, rows_RN = False, None
    chosen = [case for case in map(cases.random_case, range(200)) if case.layout == layout_name][:NUM_STEPS]
    for step, case in enumerate(chosen):
        backward = Backward(model, layout, distributed, max_tokens=case.max_tokens, packing=case.packing, seed=0)
        found = backward(Batch(case.examples, cases.TASKS), case.scale_T, step=step, apart=True)
        rows_RN = found.shared_RN.clone() if step == 0 else rows_RN
        attach(layout.shared_parameters(), surgery(found.shared_RN, found.tasks))
        for task, private in zip(found.tasks, found.private, strict=True):
            attach(layout.private_parameters(task), private)
        absent = [p for task in set(range(cases.TASKS)) - set(found.tasks) for p in layout.private_parameters(task)]
        before = [parameter.detach().clone() for parameter in absent]
        optimizer.step()
        optimizer.zero_grad()
        absent_moved |= not all(map(torch.equal, before, absent))
        if restart and step + 1 == RESTART:
            state = optimizer.state_dict()
            if isinstance(optimizer, ZeroOptimizer):
                optimizer.close()
            optimizer = make()
            optimizer.load_state_dict(state)
            gc.collect()  # whenever that happens, the old engine's end must not reach the new one
    state = optimizer.state_dict()
    distributed.check_identical(layout.parameters(), "The parameters")
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.close()
    return {
        "parameters": torch.cat([parameter.detach().flatten() for parameter in layout.parameters()]),
        "moments": torch.cat([entry[key].flatten() for entry in state["state"].values() for key in sorted(entry)]),
        "rows": rows_RN,
        "absent moved": absent_moved,
    }


def main(output):
    accelerator = Accelerator(cpu=True)
    report = {}
    plain = {layout: train(accelerator, layout, None) for layout in cases.LAYOUTS}
    for stage in range(4):  # 3 last: it changes torch's own functions, for the whole process
        for layout, expected in plain.items():
            if stage == 3 and layout == "full":
                continue
            for restart in (False, True):
                found = train(accelerator, layout, stage, restart)
                report[f"{layout} zero{stage}{' resumed' if restart else ''}"] = {
                    **{
                        key: float((found[key] - expected[key]).norm() / expected[key].norm())
                        for key in ("parameters", "moments", "rows")
                    },
                    "absent moved": found["absent moved"],
                }
    if accelerator.is_main_process:
        Path(output).write_text(json.dumps(report), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
