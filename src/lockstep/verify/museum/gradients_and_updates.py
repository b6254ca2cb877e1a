"""Bugs of gradients, of clipping and of the optimizer's update; lockstep.verify.museum.table has them all."""

from __future__ import annotations

from lockstep.verify.museum import mutations
from lockstep.verify.museum.bug import CLIPPED, GROUP, REFUSED, Bug

WEIGHED_LOSS = "scaler.scale(loss * micro.weight).backward()"
ACCUMULATED = "            with contextlib.nullcontext() if last else model.no_sync():\n"
LOGGED = "            run.record(loss=loss, weight=micro.weight)\n"
SLOWLY = GROUP | {"optim.name": "sgd", "optim.lr": 0.05}
PLACED = "    model = run.place(run.task.build_model())\n"
BUILT = "    optimizer = build_optimizer(run.config.optim, model)\n"
SCHEDULED = "    scheduler = build_scheduler(run.config.optim, optimizer, run.scheduled_steps)\n"
SHARDED = "    shard(model, make_mesh(run), run)\n"
SYNCHRONISED = '        average_gradients(model, mesh.get_group("data"))\n'
OF_STAGES = "        average_gradients(mine, data_group)\n"

OF_GRADIENTS_AND_UPDATES = (
    # How much each part of a batch counts
    Bug(
        "micro-batches-weigh-alike",
        ("huggingface/transformers#34191", "meta-pytorch/torchtune#1875"),
        "With gradient accumulation every micro-batch's mean loss weighed the same, however many tokens it had. "
        "The same batch gave other gradients and a higher loss in pieces than in one.",
        "grad_accumulation",
        "gradients",
        GROUP,
        {"accumulate": 4},
        ((WEIGHED_LOSS, "scaler.scale(loss / len(pieces)).backward()"),),
    ),
    Bug(
        "last-micro-batch-alone",
        ("allenai/open-instruct#1498", "NVIDIA-NeMo/Automodel#3530"),
        "Gradients that had been added up were thrown away before the next micro-batch's backward. Only the last one "
        "trained the model; the logged loss looked right.",
        "grad_accumulation",
        "gradients",
        GROUP,
        {"accumulate": 4},
        ((ACCUMULATED, "            optimizer.zero_grad()\n" + ACCUMULATED),),
    ),
    Bug(
        "last-micro-batch-not-averaged",
        ("modelscope/FunASR#3472", "karpathy/build-nanogpt#30"),
        "no_sync, which keeps DDP from averaging before the last micro-batch, was off for the first one and on for the "
        "last. What came after the first stayed on its rank, and the replicas drifted apart.",
        "grad_accumulation",
        "gradients",
        GROUP,
        {"accumulate": 4},
        ((ACCUMULATED, ACCUMULATED.replace("if last", "if number == 0")),),
    ),
    Bug(
        "clipped-at-every-micro-batch",
        ("facebookresearch/lingua#59", "huggingface/transformers#986"),
        "Gradients were clipped after each micro-batch's backward, and not once before the update. The first ones were "
        "clipped again and again, and the last micro-batch counted most.",
        "grad_accumulation",
        "gradients",
        GROUP | CLIPPED,
        {"accumulate": 4},
        ((LOGGED, LOGGED + "            clip_gradients(model, optimizer, scaler, run.config.gradients)\n"),),
    ),
    Bug(
        "divided-by-the-ranks-twice",
        ("meta-pytorch/torchtune#2172",),
        "Gradients were divided by the tokens of all ranks, and by the number of ranks besides, which DDP and FSDP do "
        "by themselves. They were too small by the number of ranks.",
        "ddp",
        "gradients",
        GROUP,
        edits=((WEIGHED_LOSS, "scaler.scale(loss * micro.weight / run.world.world_size).backward()"),),
    ),
    Bug(
        "ranks-weigh-alike",
        ("huggingface/transformers#39395", "pytorch/torchtitan#2206"),
        "Every rank's mean loss weighed the same, however many tokens the rank had: a token beside much padding "
        "counted for many others. In the Trainer it was the default until July 2025.",
        "ddp",
        "gradients",
        edits=((WEIGHED_LOSS, "scaler.scale(loss).backward()"),),
        task="lockstep.verify.museum.ragged:Ragged",
    ),
    Bug(
        "pipeline-gradients-not-divided",
        ("pytorch/torchtitan#2972",),
        "Under pipeline parallelism the loss was divided by the number of tokens after backward, for the log alone. "
        "Gradients were as many times too large; the logged loss was right.",
        "pipeline_parallel",
        "gradients",
        GROUP,
        edits=((OF_STAGES, OF_STAGES + "        [p.grad.mul_(len(micros)) for p in mine.parameters()]\n"),),
    ),
    Bug(
        "tensor-ranks-counted-as-copies",
        ("meta-pytorch/torchtune#2436",),
        "Gradients were scaled by the number of all ranks, where those that share a model by tensor parallelism are "
        "one copy of it. They were too large by the number of ranks that share.",
        "tensor_parallel",
        "gradients",
        edits=((SYNCHRONISED, SYNCHRONISED + "        [p.grad.mul_(tensor) for p in model.parameters()]\n"),),
    ),
    # Gradients that are not the batch's
    Bug(
        "ddp-bypassed",
        ("huggingface/trl#7245", "jingyaogong/minimind#854"),
        "The loss was computed by the module inside of DistributedDataParallel, whose own forward arms the all-reduce. "
        "Each rank trained a model of its own on its share of the data, and one of them was saved.",
        "ddp",
        "gradients",
        GROUP,
        edits=(("run.task.loss(model(micro.inputs)", "run.task.loss(model.module(micro.inputs)"),),
    ),
    Bug(
        "experts-gradients-doubled",
        ("pytorch/pytorch#160285",),
        "With experts shared by two ranks the gradients were exactly twice as large. AdamW hides a factor, so the loss "
        "curves looked the same.",
        "expert_parallel",
        "gradients",
        {"task.experts": 4, "task.balance": 0.1},
        names={"average_over_ranks": mutations.sum_experts_gradients},
    ),
    Bug(
        "balance-teaches-nothing",
        ("NVIDIA-NeMo/Automodel#1408", "NVIDIA-NeMo/Automodel#1412"),
        "The addend of the loss that keeps experts evenly used was computed, and no gradient of it ever reached the "
        "router. The experts were free to fall out of use.",
        "expert_parallel",
        "gradients",
        {"task.experts": 4, "task.balance": 0.1},
        patch=mutations.balance_teaches_nothing,
    ),
    Bug(
        "norms-gradients-not-added-up",
        ("EleutherAI/gpt-neox#1257", "NVIDIA/Megatron-LM#1446"),
        "With sequence parallelism each rank has the gradients of norm weights from its own slice of the sequence, and "
        "they were not added up. The copies drifted apart; the loss fell slowly and then stood still.",
        "tensor_parallel",
        "gradients",
        own={"sequence_parallel": True},
        names={"complete_gradients": mutations.keep_partial_gradients},
    ),
    Bug(
        "recomputed-dropout-is-another",
        ("openai/guided-diffusion#167", "allenai/OLMo-core#828"),
        "Checkpointed blocks ran their forward a second time without the first one's random numbers: backward went "
        "through another dropout mask than the loss. Trainings got a worse loss, or diverged.",
        "single",
        "gradients",
        {"task.dropout": 0.2},
        {"checkpoint_activations": "full"},
        patch=mutations.recomputed_dropout_is_another,
        task="language",
    ),
    Bug(
        "ranks-start-apart",
        ("pytorch/torchtitan#166",),
        "The weights were drawn before a seed was set, and nothing sent them around. Every rank trained a model of its "
        "own with the mean of all gradients; the loss still fell, but less, and stood still early.",
        "context_parallel",
        "loss",
        edits=((PLACED, "    torch.manual_seed(run.config.seed + run.world.rank)\n" + PLACED),),
    ),
    Bug(
        "gradients-never-zeroed",
        ("meta-pytorch/torchforge#71", "tenstorrent/tt-blacksmith#711"),
        "zero_grad was never called: each step updated the weights by the sum of all gradients since the start.",
        "ddp",
        "loss",
        GROUP,
        edits=(("        optimizer.zero_grad()\n", ""),),
    ),
    Bug(
        "routers-gradients-not-averaged",
        ("pytorch/torchtitan#2416", "huggingface/transformers#48205"),
        "Each rank has the gradient of the router by its own tokens, or its own experts, and a missing all-reduce left it "
        "there. The copies of the router drifted apart; the loss of a step was right.",
        "expert_parallel",
        "gradients",
        {"task.experts": 4, "task.balance": 0.1},
        names={"average_over_ranks": mutations.leave_routers_apart},
    ),
    Bug(
        "alpha-not-divided-by-the-rank",
        ("rasbt/LLMs-from-scratch#821", "Blaizzy/mlx-vlm#841"),
        "LoRA's product was scaled by alpha, not by alpha divided by the matrices' rank: with common settings 8 times too "
        "much. Trainings with the settings of a paper collapsed.",
        "lora",
        "gradients",
        SLOWLY,
        {"weights": "random", "merge": False, "alpha": 2.0, "r": 2},
        patch=mutations.alpha_not_divided,
    ),
    # Clipping by a norm that is not the whole one
    Bug(
        "shards-clipped-by-their-own-norm",
        ("pytorch/pytorch#72548", "PrimeIntellect-ai/OpenDiloco#6", "pytorch/pytorch#170862"),
        "Of a sharded model each rank clipped by the norm of its own shard: parts of one gradient were scaled by "
        "unequal factors.",
        "fsdp",
        "weights",
        GROUP | CLIPPED,
        patch=mutations.clips_by(mutations.own_norm),
    ),
    Bug(
        "stages-clipped-by-their-own-norm",
        ("pytorch/torchtitan#596", "pytorch/torchtitan#649"),
        "Under pipeline parallelism each stage clipped by the norm of its own layers, not of the whole model.",
        "pipeline_parallel",
        "weights",
        GROUP | CLIPPED,
        edits=(("run.config.gradients, stage_group)", "run.config.gradients)"),),
    ),
    Bug(
        "experts-clipped-by-their-own-norm",
        ("NVIDIA-NeMo/Automodel#3816", "NVIDIA/Megatron-LM#5916"),
        "The norm left out other ranks' experts. Ranks clipped the weights that all of them have by unequal factors, so "
        "these drifted apart; each rank logged a norm that looked right.",
        "expert_parallel",
        "weights",
        {"task.experts": 4, **CLIPPED},
        patch=mutations.clips_by(mutations.own_norm),
    ),
    Bug(
        "copies-in-the-norm",
        ("ROCm/TransformerEngine#715",),
        "Weights that each tensor-parallel rank has whole entered the norm once for every rank. It was up to 1.5 times "
        "too large, and gradients were clipped more than asked for.",
        "tensor_parallel",
        "weights",
        CLIPPED,
        patch=mutations.clips_by(mutations.norm_with_copies),
    ),
    # Optimizer and schedule
    Bug(
        "optimizer-built-before-sharding",
        ("pytorch/pytorch#149205", "mosaicml/composer#3822"),
        "The optimizer held other tensors than the sharded ones: those that a forward had gathered, or those from before "
        "fully_shard. Its steps changed nothing that the model computed with, and no error said so.",
        "fsdp",
        REFUSED,
        GROUP,
        edits=((BUILT, ""), (SHARDED, BUILT + SHARDED)),
    ),
    Bug(
        "schedule-of-another-optimizer",
        ("pytorch/ignite#545", "facebookresearch/fairscale#66"),
        "A wrapper had given the real optimizer parameter groups of its own. The schedule changed the learning rate in "
        "the old ones, which nobody read any more, and the training kept the first one to its end.",
        "zero1",
        "weights",
        GROUP,
        edits=((SCHEDULED, SCHEDULED.replace(" optimizer,", " build_optimizer(run.config.optim, model),")),),
    ),
    Bug(
        "schedule-steps-once-per-rank",
        ("huggingface/transformers#24088", "huggingface/accelerate#2142"),
        "Each step of the training moved the schedule on by as many steps as there are ranks: the learning rate was "
        "down after a fraction of the training.",
        "ddp",
        "weights",
        GROUP,
        edits=(("        scheduler.step()\n", "        [scheduler.step() for _ in range(run.world.world_size)]\n"),),
    ),
    Bug(
        "adam-counts-a-step-too-many",
        ("NVIDIA/Megatron-LM#5974", "NVIDIA/Megatron-LM#5976"),
        "To allocate its state, the optimizer made a step with gradients of zero, and counted it. Adam's correction of "
        "its young moments was a step ahead: the first update was 1.3 times too small.",
        "fsdp",
        "weights",
        GROUP | {"optim.name": "adamw", "optim.lr": 0.001},
        names={"build_optimizer": mutations.build_with_a_step_made},
    ),
    Bug(
        "norms-decayed-too",
        ("verl-project/verl#5070", "ServiceNow/Fast-LLM#542"),
        "Weight decay was to leave out norms and biases, and took all parameters: a refactoring had lost the difference.",
        "ddp",
        "loss",
        GROUP | {"optim.decay_norms_and_biases": False, "optim.weight_decay": 0.1},
        names={"build_optimizer": mutations.build_with_all_decayed},
    ),
    Bug(
        "outer-step-goes-backwards",
        ("meta-pytorch/torchft#233",),
        "DiLoCo's outer optimizer takes how far the replicas have come for a gradient, and its sign was the wrong one.",
        "local_sgd",
        "loss",
        SLOWLY,
        {"period": 1},
        patch=mutations.outer_step_goes_backwards,
    ),
)
