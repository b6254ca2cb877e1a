"""Every bad input: one line that names the value, what is allowed and what to change; exit code 2; nothing created.

What lies in files, such as damaged images, weights and checkpoints, is in the tests of what reads them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lockstep.config.compose import compose
from lockstep.recipe import Recipe
from recipes import (
    comm_hooks,
    compare,
    data_parallel,
    ddp,
    deepspeed_zero,
    diff,
    doctor,
    fsdp,
    grad_accumulation,
    lightning_fabric,
    lightning_trainer,
    lora,
    model_parallel,
    pipeline_parallel,
    single,
    sync_batchnorm,
    transfer_learning,
    tune,
    verify,
)
from tests.helpers.command_line import assert_one_line, run_main
from tests.helpers.harness import command
from tests.helpers.processes import free_port

NO_GPU = not torch.cuda.is_available()

DDP = {
    "bacth_size=3": ["unknown key bacth_size", "did you mean global_batch_size?"],
    "batch_size=3": ["batch_size: is called global_batch_size now; write global_batch_size=3"],
    "monitor=csv": ["monitor: is called logger now; write logger=csv"],
    "fsdp.replicas=2": ["fsdp.replicas: is called replicate now; write replicate=2"],
    "zero.stage=3": ["zero.stage: is called stage now; write stage=3"],
    "optim.lrr=3": ["unknown key optim.lrr", "did you mean optim.lr?"],
    "lr=0.1": ["unknown key lr", "optim.lr"],
    "+foo=1": ["unknown key foo", "--help"],
    "+optim.lrr=1": ["unknown key optim.lrr", "optim.lr"],
    "global_batch_size=abc": ["global_batch_size=abc", "whole numbers from 1 up, or auto"],
    "global_batch_size=null": ["batch_size=None", "whole numbers from 1 up, or auto"],
    "global_batch_size=1.5": ["global_batch_size=1.5", "whole numbers from 1 up, or auto"],
    "global_batch_size=true": ["global_batch_size=True", "whole numbers from 1 up, or auto"],
    "global_batch_size=auto accumulate=2000": ["accumulate=2000", "718 images"],
    "global_batch_size=auto memory_fraction=0": ["memory_fraction=0.0", "above 0, up to 1"],
    "global_batch_size=auto epochs=0": ["epochs=0", "from 1 up"],
    "global_batch_size=auto +cluster=slurm cluster.nodes=2": [
        "global_batch_size=auto",
        "srun",
        "python -m recipes.doctor memory",
    ],
    "memory=all": ["memory=all", "allowed are report"],
    "record_tensors=-1": ["record_tensors=-1: allowed are 0…100"],
    "record_tensors=2 compile=true": ["record_tensors=2", "compile=true", "leave one out"],
    "profile=-1": ["profile=-1: allowed are 0…100"],
    "profile=101": ["profile=101: allowed are 0…100"],
    "profile=7 max_steps=12": ["profile=7", "the run's 12 steps", "0…6"],
    "profile=1 max_steps=2": ["profile=1", "the run's 2 steps", "0…0"],
    "checkpoint_activations=some": [
        "checkpoint_activations=some: allowed are none, full, selective, and numbers from 1"
    ],
    "checkpoint_activations=0": ["checkpoint_activations=0: allowed are none, full, selective, and numbers from 1"],
    "checkpoint_activations=9": ["checkpoint_activations=9", "8 blocks", "1…8"],
    "checkpoint_activations=5 task=language": ["checkpoint_activations=5", "4 blocks", "1…4"],
    "checkpoint_activations=full compile=true": ["checkpoint_activations=full", "compile=true", "leave one out"],
    "memory=report compile=true": ["memory=report", "compile=true"],
    "recipes=[ddp]": ["recipes=[ddp]", "recipes.ddp does not use it", "doctor"],
    "compile=maybe": ["compile=maybe", "bool"],
    "optim.lr=fast": ["optim.lr=fast", "Float"],
    "optim.lr=-1": ["optim.lr=-1", "from 0 up"],
    "epochs=0": ["epochs=0", "from 1 up"],
    "max_steps=0": ["max_steps=0", "from 1 up"],
    "timeout_seconds=0": ["timeout_seconds=0: allowed are 1…31536000"],
    "global_batch_size=0": ["global_batch_size=0", "from 1 up"],
    "seed=-1": ["seed=-1: allowed are 0…4294967295"],
    "seed=4294967296": ["seed=4294967296: allowed are 0…4294967295"],
    "seed=null": ["seed=null: null is not allowed"],
    "seed=1.5": ["seed=1.5", "allowed are whole numbers"],
    "seed=ünï": ["seed=ünï: cannot be read", "quotes"],
    "seed=${x}": ["seed: Interpolation key 'x' not found"],
    "=3": ["'=3': names no key", "seed=1"],
    "task=": ["task=: is empty; allowed are images, language"],
    "epochs=99999999999": ["epochs=99999999999: allowed are numbers up to 2147483647"],
    "optim.lr=1e300": ["optim.lr=1e+300: allowed are numbers up to 1e+30"],
    "data.mean=[0,0,-1e300]": ["data.mean=", "allowed are numbers from -1e+30 up"],
    "data=synthetic data.size=2000000000": ["data.size=2000000000 data.image_size=32", "MiB of memory", "set smaller"],
    "data.image_size=1000000": ["data.image_size=1000000: allowed are 1…16384"],
    "model.num_classes=10000000000": ["model.num_classes=10000000000: allowed are 1…10000000"],
    "data.workers=100000": ["data.workers=100000: allowed are 0…1024"],
    "nproc=100000": ["nproc=100000: allowed are 1…4096"],
    "threads=1000000": ["threads=1000000: allowed are 1…4096"],
    "timeout_seconds=99999999999999999999": ["timeout_seconds=99999999999999999999: allowed are 1…31536000"],
    "task=language task.experts=100000": ["task.experts=100000: allowed are 0…4096"],
    "launcher=os": ["launcher=os: has neither launch nor submit"],
    "launcher=../x": ["launcher=../x: no such module"],
    "+cluster=slurm cluster.ranks=../x": ["cluster.ranks=../x: no such module; allowed are slurm, lightning"],
    "+cluster=slurm cluster.time_minutes=99999999999": ["cluster.time_minutes=99999999999", "up to 2147483647"],
    "logger=[csv,null]": ["logger=[csv,null]: allowed are csv, mllog, wandb, tensorboard; several as [csv,mllog]"],
    "logger=null": ["logger=null: allowed are csv, mllog, wandb, tensorboard"],
    "+debug=[null]": ["+debug=[null]: allowed are smoke, anomaly"],
    "optim=null": ["optim=null: allowed are sgd, adam, muon, adamw"],
    "optim=[]": ["optim=[]: allowed are sgd, adam, muon, adamw"],
    "data.classes=[null]": ["data.classes=[null]", "texts alone"],
    "model=../x": ["model=../x: no such option; allowed are resnet18"],
    "optim.arguments={}": ["optim.arguments={}: changes nothing; set optim.arguments.NAME=VALUE"],
    "gradients.clip_value={fc.*:1e300}": ["gradients.clip_value.fc.*=1e+300: allowed are numbers up to 1e+30"],
    "optim.arguments={dampening:1e300}": ["optim.arguments.dampening=1e+300: allowed are numbers up to 1e+30"],
    "+cluster=slurm cluster.setup.x=y": ["cluster.setup.x=y: a list's entries have no names; write KEY=[a,b]"],
    "hydra.run.dir=x": ["hydra.run.dir=x: Hydra only composes here", "out=FOLDER"],
    "hydra/launcher=basic": ["hydra/launcher=basic: Hydra only composes here"],
    "-m seed=1,x": ["seed=x", "whole numbers"],
    "--cfg": ["--cfg: lacks its value; write --cfg=…"],
    "-c foo": ["--cfg=foo: allowed are job, hydra, all"],
    "--config-dir": ["--config-dir: lacks its value"],
    "optim.lr=nan": ["optim.lr=nan", "finite"],
    "optim.lr=inf": ["optim.lr=inf", "finite"],
    "data.std=[0,0,0]": ["data.std=", "from 1e-06 up"],
    "data.num_classes=5": ["data.num_classes=5", "digits has 10"],
    "data.image_size=16": ["data.image_size=16", "8 × 8", "model.image_size"],
    "global_batch_size=2": ["global_batch_size=2", "BatchNorm", "model.norm=group"],
    "accumulate=49": ["accumulate=49", "48 images", "1…48"],
    "cut=layer2": [
        "cut=layer2",
        "recipes.ddp does not use it",
        "recipes.model_parallel, recipes.parallel_mesh and recipes.pipeline_parallel",
    ],
    "stages=2": ["stages=2", "recipes.ddp does not use it", "pipeline_parallel"],
    "nproc=0": ["nproc=0: allowed are 1…4096"],
    "model=resnet19": ["model=resnet19", "allowed are resnet18, resnet34, resnet50, resnet101, resnet152"],
    "data=mnist": ["data=mnist", "digits", "cifar10"],
    "tune=asha": ["tune=asha", "recipes.ddp does not use it; it belongs to recipes.tune"],
    "tune.trials=3": ["tune.trials=3", "recipes.ddp does not use it"],
    "optim=adagrad": ["optim=adagrad", "sgd", "adamw"],
    "logger=tb": ["logger=tb", "csv", "tensorboard"],
    "+debug=all": ["debug=all", "smoke"],
    "+cluster=nowhere": ["cluster=nowhere", "slurm"],
    "cluster=slurm": ["cluster=slurm", "+cluster=slurm"],
    "cluster.nodes=2": ["cluster.nodes=2", "+cluster=slurm"],
    "precision=fp15": ["precision=fp15", "fp32, bf16, fp16, fp64, auto"],
    "channels_last=maybe": ["channels_last=maybe: allowed are auto, true, false"],
    "channels_last=1": ["channels_last=1: allowed are auto, true, false"],
    "channels_last=null": ["channels_last=null: allowed are auto, true, false"],
    "allocator=tcmalloc": ["allocator=tcmalloc: allowed are auto, keep, system"],
    "cudnn_benchmark=2": ["cudnn_benchmark=2: allowed are auto, true, false"],
    "comm=fp8": ["comm=fp8: allowed are fp32, bf16, fp16"],
    "model.norm=layer": ["model.norm=layer", "batch, group"],
    "model.init=zero": ["model.init=zero", "kaiming, zero_residual, xavier"],
    "model.num_classes=9": ["model.num_classes=9", "digits has 10 classes", "from 10 up"],
    "model.image_size=4": ["model.image_size=4: allowed are 8…16384"],
    "optim.schedule=step": ["optim.schedule=step", "constant, cosine"],
    "global_batch_size=33": ["global_batch_size=33", "2 ranks", "32, 34"],
    "nproc=5": ["global_batch_size=96", "5 ranks", "95, 100"],
    "verify=true": ["verify=true: recipes.ddp does not use it; it belongs to recipes.compare"],
    "nprocs=[1,2]": ["nprocs=[1,2]: recipes.ddp does not use it; it belongs to recipes.compare"],
    "global_batch_size=2000": ["global_batch_size=2000", "1437"],
    "backend=nccl device=cpu": ["backend=nccl", "gloo"],
    "backend=mpi": ["backend=mpi", "gloo, nccl"],
    "device=tpu": ["device=tpu", "auto, cpu, cuda"],
    "data.mean=[0.5]": ["data.mean", "3 numbers"],
    "data=cifar10": ["data=cifar10", "data.root"],
    "data=cifar10 data.root=nowhere": ["data.root=nowhere", "no such folder"],
    "data=cifar10 data.root=.": ["data.root=.", "cifar-10-batches-bin", "data.download=true"],
    "data=imagefolder data.root=.": ["train", "no such folder", "data.root"],
    "out=/proc/nowhere/run": ["out=/proc/nowhere/run", "cannot be made"],
    "launcher=magic": [
        "launcher=magic: no such module; allowed are lightning, slurm, torchrun, or a module of your own"
    ],
    "launcher=launchers.magic": ["launcher=launchers.magic: no such module"],
    "launcher=torchrun.magic": ["launcher=torchrun.magic: no such module"],
    "launcher=json": ["launcher=json: has neither launch nor submit; allowed are lightning, slurm, torchrun"],
    "launcher=": ["launcher=: no such module"],
    "+cluster=slurm cluster.launcher=pbs": ["cluster.launcher=pbs: no such module; allowed are lightning, slurm"],
    "global_batch_size=8,16": ["global_batch_size=8,16", "--multirun"],
    "global_batch_size": ["global_batch_size: is no setting", "write KEY=VALUE"],
    "foo": ["foo: is no setting", "write KEY=VALUE"],
    "--config-dir=nowhere": ["nowhere", "not found"],
    "resume=somewhere": ["resume=somewhere", "no such file or folder"],
    "resume=.": ["resume=.", "holds no checkpoint"],
    "resume=/dev/null": ["resume=/dev/null", "no such file or folder"],
    "checkpoint.every=0": ["checkpoint.every=0", "from 1 up"],
    "checkpoint.keep=0": ["checkpoint.keep=0", "from 1 up"],
    "patience=0": ["patience=0", "from 1 up"],
    "metric=speed": ["metric=speed", "eval_accuracy, eval_loss, eval_f1"],
    "loss_scale=0.5": ["loss_scale=0.5", "from 1 up"],
    "loss_scale=1024": ["loss_scale=1024", "precision=fp32 scales no loss", "set precision=fp16"],
    "max_restarts=-1": ["max_restarts=-1", "from 0 up"],
    "start=magic": ["start=magic", "auto, spawn, fork"],
    "start=fork +cluster=slurm": ["start=fork", "srun starts"],
    "logger=[csv,tb]": ["logger=tb", "csv, mllog, wandb, tensorboard"],
    "logger.images=65": ["logger.images=65", "0…64"],
    "logger.histograms=-1": ["logger.histograms=-1", "from 0 up"],
    "gradients.clip_norm=0": ["gradients.clip_norm=0", "above 0"],
    "gradients.clip_norm=-1": ["gradients.clip_norm=-1", "above 0"],
    "gradients.clip_norm=nan": ["gradients.clip_norm=nan", "finite"],
    "gradients.warn_above=0": ["gradients.warn_above=0", "above 0"],
    "gradients.clip_value=3": ["gradients.clip_value=3", "{fc.*: 0.1}"],
    "gradients.clip_value={fc.*:0}": ["gradients.clip_value.fc.*=0", "above 0"],
    "gradients.clip_value={fc.*:nan}": ["gradients.clip_value.fc.*=nan", "finite"],
    "gradients.clip_value={fc.*:a}": ["gradients.clip_value.fc.*=a", "above 0"],
    "gradients.clip_value={head.*:1}": ["gradients.clip_value.head.*", "none", "conv1.weight", "fc.bias"],
    "+cluster=slurm cluster.partitoin=gpu": ["unknown key cluster.partitoin", "did you mean cluster.partition?"],
    "+cluster=slurm cluster.nodes=0": ["cluster.nodes=0", "from 1 up"],
    "+cluster=slurm nproc=2": ["nproc=2", "cluster.tasks_per_node"],
    "+cluster=slurm cluster.nodes=5": ["global_batch_size=96", "5 ranks", "95, 100"],
    "+cluster=slurm cluster.gpus_per_node=2 cluster.tasks_per_node=4": ["cluster.tasks_per_node=4", "1…2"],
    "+cluster=slurm cluster.gpus_per_node=gpu:4": ["cluster.gpus_per_node=gpu:4", "such as a100:4"],
    "+cluster=slurm cluster.name=a +cluster.sbatch.job-name=b": ["cluster.name=a", "job-name=b", "leave one out"],
    "+cluster=lightning cluster.dry_run=true": ["cluster.dry_run=true", "has no queue"],
    "+cluster=slurm device=cpu backend=nccl": ["backend=nccl", "gloo"],
    "accumulate=5 global_batch_size=8 nproc=2": ["accumulate=5", "only 4 images", "1…4"],
    "schedule=gpipe": ["schedule=gpipe", "recipes.ddp does not use it", "pipeline_parallel"],
    "accumulate_by=unbind": ["accumulate_by=unbind", "grad_accumulation"],
    "recipes=[single]": ["recipes=", "recipes.ddp does not use it", "verify"],
    "stage=3": ["stage=3: recipes.ddp does not use it; it belongs to recipes.deepspeed_zero"],
    "offload=true": [
        "offload=true: recipes.ddp does not use it; it belongs to recipes.deepspeed_zero and recipes.fsdp"
    ],
    "sync_batchnorm=true": ["sync_batchnorm=true", "recipes.ddp does not use it", "lightning_fabric"],
    "freeze=[fc.*]": ["freeze=[fc.*]: recipes.ddp does not use it; it belongs to recipes.transfer_learning"],
    "+cluster=lightning cluster.partition=gpu": ["cluster.partition=gpu", "has no queue", "cluster.tasks_per_node"],
    "+cluster=lightning start=magic": ["start=magic", "spawn, fork"],
    "+cluster=lightning cluster.nodes=2": ["NODE_RANK, MASTER_ADDR, MASTER_PORT not set", "lightning_slurm"],
    "+cluster=lightning nproc=2 cluster.tasks_per_node=4": ["nproc=2", "leave it out"],
    "+cluster=lightning nproc=5": ["global_batch_size=96", "5 ranks"],
    "+cluster=lightning bacth_size=3": ["unknown key bacth_size"],
}
if NO_GPU:
    DDP["device=cuda"] = ["device=cuda", "no CUDA device", "device=cpu"]
DOCTOR = {
    "run=nowhere optim.lr=0.3": ["optim.lr=0.3: means nothing to run=nowhere; leave it out"],
    "run=nowhere task=language": ["task=language: means nothing to run=nowhere; leave it out"],
    "memroy": ["check=memroy", "allowed are preflight, memory"],
    "global_batch_size=33": ["global_batch_size=33", "32, 34"],
    "recipes=[]": ["recipes=[]: names none; allowed are", "ddp"],
    "recipes=ddp": ["recipes=ddp", "allowed are lists, such as [a,b]"],
    "preflight recipes=[none]": ["recipes=[none]", "no such recipe"],
    "nproc=5": ["global_batch_size=96", "5 ranks", "95, 100"],
    "memory recipes=[fsdp,ddp]": ["recipes=[fsdp,ddp]", "one recipe at a time"],
    "memory recipes=[none]": ["recipes=[none]", "no such recipe"],
    "memory recipes=[fsdp] replicate=3": ["replicate=3", "allowed are 1, 2"],
    "memory stage=3": ["stage=3", "deepspeed_zero"],
    "memory global_batch_size=33": ["global_batch_size=33", "32, 34"],
}
TUNE = {
    "tune.recipe=ddpp": ["tune.recipe=ddpp", "allowed are", "grad_accumulation"],
    "tune=bayes": ["tune=bayes", "asha, optuna"],
    "tune.search=grid": ["tune.search=grid", "random, optuna"],
    "tune.space={}": ["tune.space={}: changes nothing; set tune.space.NAME=VALUE"],
    "tune.space.seed=sample_from((10**64)**64)": ["is too large"],
    "tune.trials=0": ["tune.trials=0: allowed are 1…100000"],
    "tune.trails=4": ["unknown key tune.trails", "did you mean tune.trials?"],
    "tune.space.optim.lrr=uniform(0,1)": ["unknown key optim.lrr in tune.space", "did you mean optim.lr?"],
    "tune.space.optim.lr=normal(0,1)": ["tune.space.optim.lr=normal(0,1)", "loguniform", "choice"],
    "tune.space.optim.lr=uniform(-1,1)": ["optim.lr=-1.0", "from 0 up"],
    "tune.space.model.norm=choice(batch,layer)": ["model.norm=layer", "batch, group"],
    "tune.space.global_batch_size=choice(48,49)": ["tune.space can draw", "global_batch_size=49", "2 ranks", "48, 50"],
    "tune.space.eval_batch_size=choice(big)": ["eval_batch_size=big", "Integer"],
    "tune.space.epochs=choice(1,2)": ["tune.space.epochs", "same for all trials"],
    "tune.space.out=choice(a,b)": ["tune.space.out", "same for all trials"],
    "tune.space.stages=choice(2)": ["unknown key stages in tune.space", "recipes.ddp does not use it"],
    "~tune.space.optim ~tune.space.global_batch_size": ["tune.space", "is empty", "tune=asha"],
    "global_batch_size=auto": ["global_batch_size=auto", "set a number, or draw it with tune.space.global_batch_size"],
    "stage=3": ["stage=3", "recipes.tune does not use it"],
    "tune.nproc=5": ["tune.space can draw", "5 ranks"],
    "tune.recipe=single tune.nproc=2": ["recipes.single runs on 1 rank, not 2"],
    "tune.address=ray://head:10001": ["tune.address=ray://head:10001", "auto", "HOST:PORT"],
    "tune.address=127.0.0.1:1": ["tune.address=127.0.0.1:1", "ray start --head"],
}
PIPELINE = {
    "schedule=zero_bubble checkpoint_activations=selective": ["checkpoint_activations=selective", "none, full, K"],
    "cut=layer9": ["cut=layer9", "layer1, layer2, layer3, layer4", "layer4.1", "balanced"],
    "cut=[layer2,layer3]": ["cut=[layer2,layer3]", "makes 3 parts, not 2"],
    "stages=3 nproc=2": ["stages=3", "2 ranks", "nproc"],
    "cut=balanced stages=11 nproc=11 micro_batches=12": ["cut=balanced", "10 blocks", "11 parts"],
    "global_batch_size=96 micro_batches=5": ["global_batch_size=96", "micro_batches=5", "95, 100"],
    "schedule=unknown": ["schedule=unknown", "gpipe, 1f1b, interleaved, zero_bubble"],
    "schedule=1f1b micro_batches=1": ["micro_batches=1", "schedule=1f1b", "from 2 up", "gpipe"],
    "schedule=interleaved micro_batches=5 global_batch_size=95": ["micro_batches=5", "interleaved", "multiples of 2"],
    "accumulate=2": ["accumulate=2", "micro_batches"],
    "replicas=2": ["replicas=2", "pipeline_parallel does not use it", "data_parallel"],
}
PARTS = {
    "cut=fc9": ["cut=fc9", "layer1, layer2, layer3, layer4"],
    "cut=7": ["cut=7", "not a layer"],
    "cut=null": ["cut=", "not a layer"],
    "cut=layer3 devices=[cpu,cpu,cpu]": ["cut=layer3", "makes 2 parts, not 3"],
    "devices=[cuda:9]": ["devices=[cuda:9]"],
    "devices=[cpu,cuda:9]": ["devices=[cpu,cuda:9]", "allowed are"],
    "devices=[cpu,gpu]": ["devices=[cpu,gpu]", "allowed are"],
    "devices=[]": ["devices=[]"],
    "stages=2": ["stages=2"],
}
ZERO = {
    "stage=4": ["stage=4: allowed are 0, 1, 2, 3"],
    "precision=fp64": ["precision=fp64: DeepSpeed's optimizer computes in fp32"],
    "compile=true": ["compile=true: "],
    "channels_last=true": ["channels_last=true: "],
    "stage=0 offload=true": ["offload=true: stage 0 leaves the optimizer whole"],
    "accumulate=49": ["accumulate=49: a rank's share is only 48 images"],
    "global_batch_size=33": ["global_batch_size=33: the global batch must divide by 2 ranks"],
}
FSDP = {
    "replicate=3 nproc=4": ["replicate=3: 4 ranks do not divide by it; allowed are 1, 2, 4"],
    "replicate=0": ["replicate=0: allowed are numbers from 1 up"],
    "reduce=bf16": ["reduce=bf16: precision=fp32 averages its gradients in full"],
    "sync=never": ["sync=never: allowed are last, every"],
}
TRANSFER = {
    "": ["resume=auto and weights=null", "nothing to transfer from", "weights=imagenet"],
    "weights=resnet": ["weights=resnet", "imagenet, IMAGENET1K_V1, IMAGENET1K_V2, random"],
    "weights=imagenet": ["weights=imagenet", "7 × 7 there and 3 × 3 here", "set model.image_size=224"],
    "weights=imagenet model=narrow_resnet18": ["weights=imagenet", "none for narrow_resnet18", "set model=resnet18"],
    "weights=IMAGENET1K_V2 model.image_size=224": ["torchvision has none for resnet18", "IMAGENET1K_V1"],
    "weights=imagenet model.image_size=224 model.norm=group": ["model.norm=group has none", "model.norm=batch"],
    "resume=nowhere": ["resume=nowhere", "no such file or folder"],
    "resume=.": ["resume=.", "holds no checkpoint"],
}
COMM_HOOKS = {
    "compress=zip": ["compress=zip: allowed are powersgd, bf16, fp16"],
    "r=0": ["r=0: allowed are numbers from 1 up"],
    "r=1000": ["r=1000: two such matrices save less than half of every gradient; allowed are 1…", "compress=bf16"],
    "r=2 compress=bf16": ["r=2: compress=bf16 has no rank", "set compress=powersgd"],
    "precision=fp16": ["precision=fp16: its loss scale changes", "allowed are fp32, bf16, fp64"],
    "start_step=-1": ["start_step=-1"],
    "accumulate=49": ["accumulate=49"],
    "sync_batchnorm=true": ["sync_batchnorm", "recipes.comm_hooks"],
}
LORA = {
    "": ["resume=auto and weights=null", "nothing to transfer from"],
    "weights=random layers=[]": ["layers=[]: names none"],
    "weights=random layers=[nope,fc]": ["nope matches no Linear", "conv1", "with * and ?"],
    "weights=random r=100000": ["r=100000: every layer has a side that is smaller; allowed are 1…"],
    "weights=random layers=[fc] r=11": ["r=11: fc has a smaller side of 10; allowed are 1…10"],
    "weights=random layers=[fc] new_head=true": ["only fc.* is left"],
    "weights=imagenet": ["weights=imagenet", "7 × 7 there and 3 × 3 here"],
}
DIFF = {
    "one two seed=3": ["seed=3: means nothing to runs=[one,two]; leave it out"],
    "": ["runs=null: name two: python -m recipes.diff A B"],
    "ddp": ["runs=[ddp]: name two"],
    "ddp fsdp single": ["runs=[ddp,fsdp,single]: name two"],
    "here there": ["here: no such folder, and no recipe", "two folders of runs, or two recipes"],
    "ddp here": ["runs=[ddp,here]: ddp is a recipe, and the other is not", "./ddp"],
    "ddp fsdp tolerance=-1": ["tolerance=-1.0: allowed are numbers from 0 up"],
    "ddp fsdp record_tensors=0": ["record_tensors=0: allowed are 1…100"],
    "ddp fsdp compile=true": ["record_tensors=2", "compile=true"],
    "ddp pipeline_parallel global_batch_size=6": ["global_batch_size=6: the global batch must divide by"],
}
COMPARE = {
    "one two max_steps=3": ["max_steps=3: means nothing to runs=[one,two]; leave it out"],
    "one two nproc=1,2": ["means nothing to runs=[one,two]; leave it out"],
    "nprocs.x=1": ["nprocs.x=1", "has no keys below it"],
    "global_batch_size=auto": ["is no single training; set a number"],
    "recipes=[ddp,nope]": ["recipes=[nope]", "no such recipe", "pipeline_parallel"],
    "nproc=0": ["nproc=0", "from 1 up"],
    "nproc=1,x": ["nproc=1,x", "allowed are whole numbers", "nproc=1,2,4"],
    "nproc=[1,2": ["nproc=[1,2", "nproc=1,2,4"],
    "nproc=": ["nproc=", "nproc=1,2,4"],
    "rounds=0": ["rounds=0: allowed are 1…1000"],
    "recipes=[]": ["recipes=[]: names none; allowed are", "ddp"],
    "nproc=5000": ["nproc=5000: allowed are numbers from 1 up to 4096"],
    "epochs=0": ["epochs=0", "from 1 up"],
    "recipes=[ddp] global_batch_size=33": ["nothing is left to compare", "global_batch_size=33", "2 ranks", "32, 34"],
    "recipes=[transfer_learning]": ["nothing is left to compare", "is not the same work"],
    "schedule=gpipe": ["schedule=gpipe", "recipes.compare does not use it"],
}
NO_BATCHNORM = ["model.norm=group", "set model.norm=batch"]
TABLE: list[tuple[Recipe, dict[str, list[str]]]] = [
    (ddp.train, DDP),
    (doctor.train, DOCTOR),
    (tune.train, TUNE),
    (pipeline_parallel.train, PIPELINE),
    (model_parallel.train, PARTS),
    (deepspeed_zero.train, ZERO),
    (fsdp.train, FSDP),
    (transfer_learning.train, TRANSFER),
    (comm_hooks.train, COMM_HOOKS),
    (lora.train, LORA),
    (verify.train, {"recipes=[nope]": ["recipes=[nope]", "no such recipe", "ddp", "single"]}),
    (verify.train, {"recipes=[]": ["recipes=[]: names none; allowed are"]}),
    (compare.train, COMPARE),
    (diff.train, DIFF),
    (single.train, {"stages=2": ["stages=2", "pipeline_parallel"]}),
    (single.train, {"nproc=2": ["error: recipes.single runs on 1 rank, not 2; set nproc=1, or --nproc-per-node=1\n"]}),
    (
        data_parallel.train,
        {
            "nproc=2": ["recipes.data_parallel runs on 1 rank, not 2"],
            "compile=true": ["compile=true: replicas of a compiled model"],
            "checkpoint_activations=full": ["checkpoint_activations=full", "recipes.ddp"],
        },
    ),
    (grad_accumulation.train, {"accumulate=49": ["accumulate=49", "only 48 images"]}),
    (grad_accumulation.train, {"accumulate=5 accumulate_by=unbind": ["accumulate=5", "48 images", "chunk"]}),
    (sync_batchnorm.train, {"model.norm=group": ["no BatchNorm", *NO_BATCHNORM]}),
    (lightning_fabric.train, {"sync_batchnorm=true model.norm=group": NO_BATCHNORM}),
    (lightning_trainer.train, {"sync_batchnorm=true model.norm=group": ["holds no BatchNorm", *NO_BATCHNORM]}),
]
ROWS = [(recipe, words, parts) for recipe, table in TABLE for words, parts in table.items()]


@pytest.mark.parametrize(
    ("recipe", "words", "parts"), ROWS, ids=[f"{recipe.name} {words}" for recipe, words, _ in ROWS]
)
def test_bad_input_is_refused_in_one_line(recipe, words, parts, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert run_main(recipe, words.split(), monkeypatch) == 2
    assert_one_line(capfd, parts)
    assert list(tmp_path.iterdir()) == [], "nothing may be created"
    assert "ray" not in sys.modules or "tests.ranks.test_tune" in sys.modules, "a search is refused before Ray starts"


def test_a_directory_that_holds_something_is_never_written_to(tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "kept").write_text("mine")
    assert run_main(ddp.train, [f"out={tmp_path}"], monkeypatch) == 2
    assert f"out={tmp_path}: not empty" in capfd.readouterr().err
    assert run_main(ddp.train, [f"out={tmp_path / 'kept'}"], monkeypatch) == 2
    assert "kept: is a file; name a folder" in capfd.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "mine")]


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK"]),
        ({"PET_NNODES": "2"}, ["PET_NNODES=2", "torchrun -m"]),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ["mpirun (Open MPI) started rank 1 of 4", "MASTER_ADDR"],
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["MPICH, Intel MPI", "rank 0 of 2", "MASTER_PORT"]),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2"}, ["flux run started rank 0 of 2", "MASTER_PORT"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK=one", "whole numbers"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "65535"]),
    ],
)
def test_half_an_environment_is_refused(variables, parts, tmp_path, monkeypatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_main(ddp.train, [], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("word", ["--local_rank=0", "--nproc=2", "-x", "--", "-epochs=3"])
def test_an_option_that_there_is_not_gets_one_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(ddp.train, [word], monkeypatch) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {word}: no such option; allowed are words such as seed=1, and --help, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [("--foo", "--foo: no such option"), ("launcher=os", "launcher=os: has neither launch nor submit; allowed are")],
)
def test_a_rank_gets_that_line_too(word: str, line: str, tmp_path: Path) -> None:
    """torchrun would take a rank that ended with Hydra's page and 0 for one that has trained."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = command("-m", "recipes.ddp", word, cwd=tmp_path, **place)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert line in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_is_the_process_s(tmp_path: Path) -> None:
    """One of the table, as a user starts it."""
    done = command("-m", "recipes.ddp", "bacth_size=3", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_started_by_hand_refuse_it_too(tmp_path: Path) -> None:
    words = ["--nproc-per-node=2", "--master-port=0", "-m", "recipes.ddp", "global_batch_size=33", "out=run"]
    done = command("-m", "torch.distributed.run", "--standalone", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "error: global_batch_size=33: the global batch must divide by 2 ranks" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_image_found_while_training_is_named_in_one_line(tmp_path: Path) -> None:
    """Its first and last bytes are right, so only decoding can tell."""
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (20, 20), (number * 40, 80, 90)).save(
                    tmp_path / "images" / part / name / f"{number}.jpg"
                )
    bad = tmp_path / "images" / "train" / "dog" / "2.jpg"
    bad.write_bytes(b"\xff\xd8" + b"no image" * 20 + b"\xff\xd9")
    words = [
        "data=imagefolder",
        "data.root=images",
        "model.image_size=16",
        "global_batch_size=8",
        "epochs=1",
        "out=run",
    ]
    done = command("-m", "recipes.ddp", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(bad.relative_to(tmp_path)) in done.stderr


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("1e3", "1e3"),
        ("010", "010"),
        ("true", "true"),
        ("a=b", "a=b"),
        ("f(x", "f(x"),
        ("[a]", "[a]"),
        ("a,b", "a,b"),
        ("ünï", "ünï"),
        ("a#b", "a#b"),
        ("it's", "it's"),
        ("a\\b", "a\\b"),
        ("with space", "with space"),
        ('"in quotes"', "in quotes"),
    ],
)
def test_a_folder_s_name_is_taken_as_it_is_typed(
    typed: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so it can be pasted from the command that a run prints to continue it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ddp", f"out={typed}"])
    found: list[str | None] = []
    compose(ddp.train, lambda config: found.append(config.out))
    assert found == [kept]


@pytest.mark.parametrize("out", ["", "n" * 300, "a/" + "n" * 300, "link", "link/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_gets_one_line(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A link that leads nowhere, too, which was taken for a folder that is there, for ever."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/nonexistent/folder")
    assert run_main(ddp.train, [f"out={out}"], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: out={out}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_outputs_that_is_a_dead_link_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to("/nonexistent/folder")
    assert run_main(ddp.train, [], monkeypatch) == 2
    assert "is a link to /nonexistent/folder, which is not there" in capfd.readouterr().err
