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

Lists the options of every lever (sampler, weighter, surgery, adapters) with their parameters and defaults. With a
lever, only its own; with an option, also what it does, its formula, its source and what its parameters mean.

examples:
  mtl strategies
  mtl strategies weighter
  mtl strategies surgery=cagrad
"""

EXPORT = """usage: mtl export RUN --task NAME | --all [--format adapter|merged|gguf-ready] [--output FOLDER]

Hands over what a finished run has learnt, as folders that need no mtl: weights, tokenizer, chat template, settings of
the generation, and a README.md with scores, data, licences and how to load it.

  RUN                     the folder of the run; no checkpoint is needed
  --task NAME             a task, or several (--task a --task b, or a,b); --all for each of them
  --format adapter        one plain LoRA for peft (the default)
  --format merged         whole weights as safetensors, for AutoModelForCausalLM
  --format gguf-ready     the same, checked for llama.cpp's convert_hf_to_gguf.py
  --output FOLDER         where to; of several tasks the folder above theirs. RUN/exports/<format>/<task> by default. An
                          export that is there is replaced, anything else is left alone
  --dtype float32         of whole weights: float32, bfloat16, float16; as in the base model's files by default. Merging
                          itself is in float32
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

one adapter (or whole weights) for several tasks, out of their adapters:
  --combine sum           the weighted sum, exactly; or ties, dare_ties, dare_linear
  --tasks A,B,...  --name NAME     which, and what it is called
  --weights 0.5,0.5       one a task; 1 each by default
  --density 0.5           which share of a weight difference stays (ties, dare_*)
  --rank R                of the result of ties and dare_*; the sum of the ranks by default. Merged weights need none
  --seed 0                of what dare_* draws
"""

EVAL = """usage: mtl eval RUN_OR_EXPORT [--task NAME] [--split test|val] [--max-examples N] [--output FILE]

Evaluates what is deployed of a finished run, or an export, on the run's data by the run's own code, and prints a table
beside the run's scores. On the same device, with as many threads, these are the same to the last digit.

  RUN_OR_EXPORT           the folder of a run, of an export, or one that holds exports of adapters
  --task NAME             a task, or several; all by default
  --split test|val        test by default
  --max-examples N        of each task, evenly spaced; as many as in the run by default
  --output FILE           the scores as JSON; eval-<split>.json in the folder by default
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text
"""

PREDICT = """usage: mtl predict RUN_OR_EXPORT --task NAME --input FILE [--output FILE]

Answers the rows of a file, one JSON object a row, in order. Labels and options are chosen by likelihood, as the task is
scored; other answers are generated, greedily.

  RUN_OR_EXPORT           the folder of a run, of an export, or one that holds exports of adapters
  --task NAME             the task; may be left out if there is only one
  --input FILE            JSONL, JSON, CSV or Parquet with rows as for training ("prompt", "messages", "instruction" or
                          "conversations"), with the right answer, which is then scored, or without
  --output FILE           JSONL; standard output by default
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text
"""

CHAT = """usage: mtl chat RUN_OR_EXPORT --task NAME [--max-new-tokens N] [--temperature T]

Talks to a task's model, through the chat template and with the task's system prompt. Also reads lines from a pipe.

  RUN_OR_EXPORT           the folder of a run, of an export, or one that holds exports of adapters
  --task NAME             the task to begin with; may be left out if there is only one
  --max-new-tokens N      length limit of an answer; 256 by default
  --temperature T         of the sampling; 0, the likeliest answer, by default
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

while it runs:
  /reset                  forget what was said
  /task NAME              go on with another task
  /quit                   end; Ctrl-D, too. Ctrl-C stops an answer
"""
