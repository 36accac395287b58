"""What ``mtl <verb> --help`` prints: apart from the verbs, so that help needs none of what these import."""

from __future__ import annotations

TRAIN = """usage: mtl train [options] [overrides]

Fine-tunes one language model on several tasks. Without overrides: eight tasks that come with the package, the default
model, LoRA shared and per task.

options:
  -m, --multirun          a sweep: every combination of comma-separated values, such as strategy=pcgrad,uncertainty
                          (experiment=compare: over the strategies; sweep=optuna: a search; experiment=single_task: each
                          task by itself, as the reference of mtl report)
  --config FILE           the config.yaml that a run has left, to run it again: add output_dir=... and what shall differ
  --config-dir DIR        a folder of your own configs, searched beside the package's
  --cfg                   print the resulting config and stop
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

overrides, as in Hydra (the config of a run is conf/train.yaml, groups are the folders beside it):
  tasks=[sentiment,g2p]                           some of the tasks that come with the package
  tasks=none tasks.mine.path=data/mine            your own task: a folder with train/val/test as JSONL, CSV or Parquet
  model.name_or_path=<hub id, folder or .gguf>    another model
  strategy=temperature|performance|uncertainty|pcgrad|...  a preset; or each lever by itself (mtl strategies):
  sampler=... weighter=... surgery=... adapters=... stages=...
  max_steps=100 batch_size=16 learning_rate=2e-4 max_length=1024 seed=0
  output_dir=outputs/mine resume_from_checkpoint=auto
  resume_from=outputs/mine stages=weak_private    take a finished run further, in a new output_dir

on several processes, which are started for you, also for each run of a sweep:
  launch=gpus|fsdp2|deepspeed                     a process for each GPU, with all or with a part of the model
  launch.num_processes=2                          so many processes; without GPUs on CPUs (launch=cpu)
  -m launch=slurm                                 each run of the sweep as a Slurm job
or by accelerate launch -m mtl.train [overrides]
"""

REPORT = """usage: mtl report RUNS... [--reference RUNS...] [--output FOLDER]

Compares finished runs: which strategy makes every task good, and how sure one can be of it. Prints a table and writes a
page (report.html, no network needed) with charts (SVG, PNG) and tables (CSV) beside it.

  RUNS                    folders of runs or sweeps, or folders that hold some; strategies are told apart by their
                          configs, and runs that differ in the seed only belong to one
  --reference RUNS        what changes are relative to: single-task runs (mtl train -m experiment=single_task), or any
                          others; single-task runs among RUNS are taken if it is not given
  --output FOLDER         where the page goes; report within the first of RUNS by default
  --cases K               show the K worst examples of each task by score and by loss; 5 by default, 0: none
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

a blind comparison by people, of the answers of two strategies or runs:
  mtl report RUN_A RUN_B --blind     writes blind.html, for the judges, and blind_key.json, which they must not see
  mtl report --judgements FILES... --key blind_key.json     who has won, and whether the judges agree
"""

MERGE = """usage: mtl merge RUNS... --output FOLDER [--start RUN] [options]

Merges finished runs that began alike and were trained with different emphasis (ForkMerge): their trainable parameters
are mixed by weights that validation data choose, each task's own parameters by weights of their own. By the objective
the result is never worse on validation data than the best of the runs. It is a run's folder: mtl report shows it, and
training goes on from it with resume_from=FOLDER.

  RUNS                    folders of the branches, or of a sweep: of one model, one list of tasks, one adapter layout
  --output FOLDER         where the result goes; must not be there yet
  --start RUN             the run that they all began with (resume_from): the mixture may also keep a part of it, and
                          what it has cost counts once
  --select OBJECTIVE      mean_loss_ratio, worst_loss_ratio, mean_score, worst_score, mean_change or worst_change; the
                          first run's select_by by default
  --reference RUNS        folder of the single-task runs that changes are relative to
  --max-evaluations N     how many mixtures are validated at most; 12 for each run by default
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

example:
  mtl train stages=joint output_dir=out/first
  mtl train -m resume_from=out/first stages=weak_replay stages.weak_replay.num_weakest=1,3 sweep.dir=out/branches
  mtl merge out/branches --start out/first --output out/merged
"""

STRATEGIES = """usage: mtl strategies [lever or lever=option ...]

Lists the options of every lever: sampler, weighter, surgery, adapters. With a lever, the parameters of its options and
their defaults; with an option, also what it does, its formula, its source and what its parameters mean.

examples:
  mtl strategies
  mtl strategies weighter
  mtl strategies surgery=cagrad
"""
