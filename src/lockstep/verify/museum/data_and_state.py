"""Bugs of sequences, data, buffers, evaluation and resuming; lockstep.verify.museum.table has them all."""

from __future__ import annotations

from lockstep.verify.museum import mutations
from lockstep.verify.museum.bug import GROUP, Bug

LOOPS = "    for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):\n"
FEW = {"data.name": "synthetic", "data.size": 56}  # two steps per epoch

OF_DATA_AND_STATE = (
    # Sequences
    Bug(
        "positions-from-0-on-every-rank",
        ("thunlp/Seq1F1B#6", "ISEEKYAN/Megatron-LM#208"),
        "The sequence was cut, and each part's rotary embedding counted from the wrong position. A trained Llama began "
        "with a loss of 11 where it should have been 2.",
        "context_parallel",
        "loss",
        patch=mutations.positions_from_0,
    ),
    Bug(
        "no-target-at-the-cut",
        ("huggingface/transformers#36607", "huggingface/transformers#48493"),
        "Sequences were cut over ranks first and shifted by one for the targets then: the last token of each part had "
        "no target, in every step.",
        "context_parallel",
        "loss",
        own={"by": "ulysses"},
        edits=(("micro = share.part(micro)", "micro = without_last_target(share, micro)"),),
        names={"without_last_target": mutations.without_last_target},
    ),
    Bug(
        "one-dropout-mask-for-all-slices",
        ("PaddlePaddle/PaddleFleetX#1005", "ecmwf/anemoi-core#595"),
        "Ranks that share a sequence drew the same random numbers for their slices of it: dropout dropped the same "
        "places in each of them.",
        "tensor_parallel",
        "loss",
        {"task.dropout": 0.2},
        {"sequence_parallel": True},
        patch=mutations.one_mask_for_all_slices,
    ),
    # Data
    Bug(
        "every-rank-reads-the-same",
        ("NVIDIA/VariantWorks#126",),
        "The loader had no distributed sampler: each rank computed the same batches. Twice the GPUs did the same work "
        "twice.",
        "ddp",
        "gradients",
        GROUP,
        patch=mutations.everyone_reads_rank_0_s,
    ),
    Bug(
        "every-epoch-in-the-same-order",
        ("huggingface/transformers#4398", "pytorch/pytorch#31771"),
        "Nobody called the distributed sampler's set_epoch: every epoch came in the order of the first one.",
        "ddp",
        "loss",
        GROUP | FEW,
        patch=mutations.every_epoch_is_the_first,
    ),
    Bug(
        "same-augmentation-everywhere",
        ("pytorch/pytorch#5059", "open-mmlab/OpenPCDet#886"),
        "Workers of a loader began with copies of the same NumPy generator, so each of them augmented its samples "
        "alike. It was reported in 2018, and projects found it in their code for years.",
        "ddp",
        "loss",
        GROUP,
        patch=mutations.all_samples_draw_alike,
    ),
    # BatchNorm
    Bug(
        "recomputed-batches-count-twice",
        ("pytorch/pytorch#96136", "Tencent/YOLO-Master#262"),
        "A checkpointed block's second forward updated BatchNorm's running statistics once more. Losses and gradients "
        "were right; what was evaluated was another model.",
        "single",
        "buffers",
        {"model.norm": "batch"},
        {"checkpoint_activations": "full"},
        patch=mutations.recomputed_batches_count_twice,
    ),
    Bug(
        "frozen-batchnorm-wakes",
        ("Lightning-AI/pytorch-lightning#15062", "kdexd/virtex#16"),
        "Weights were frozen, and BatchNorm was not: model.train() had it normalise by batches and update its running "
        "statistics. The backbone that was not to change was another one afterwards.",
        "transfer_learning",
        "buffers",
        {"model.norm": "batch"},
        {"weights": "random"},
        edits=(("    hold_statistics(model)\n", "    release_statistics(model)\n"),),
    ),
    # Evaluation and weights
    Bug(
        "padded-evaluation",
        ("pytorch/pytorch#25162",),
        "The distributed sampler fills the evaluation set up with copies of samples, until ranks have equally many. "
        "They were counted twice, and the metric depended on the number of ranks.",
        "ddp",
        "evaluation",
        GROUP,
        patch=mutations.padded_evaluation,
    ),
    Bug(
        "last-evaluation-batch-weighs-too-much",
        ("huggingface/transformers#41898",),
        "The evaluation's loss was a mean over the batches' means: samples of the last, smaller batch counted more, and "
        "the number depended on the batch size.",
        "ddp",
        "evaluation",
        GROUP,
        patch=mutations.batches_weigh_alike,
    ),
    Bug(
        "one-ranks-loss-is-logged",
        ("huggingface/transformers#13681", "KellerJordan/modded-nanogpt#2"),
        "The loss that was logged was the first rank's own, not the mean over all ranks. The training was right, and its "
        "curve was that of a part of the data.",
        "ddp",
        "loss",
        GROUP,
        edits=(("run.record(loss=loss,", "run.record(loss=of_first_rank(loss),"),),
        names={"of_first_rank": mutations.of_first_rank},
    ),
    Bug(
        "evaluated-in-training-mode",
        ("wolny/pytorch-3dunet#53", "udacity/deep-learning-v2-pytorch#3"),
        "Nobody called model.eval(): dropout dropped in the evaluation, too, and what was reported was noise.",
        "single",
        "evaluation",
        {"task.dropout": 0.2},
        {"checkpoint_activations": "full"},
        patch=mutations.eval_does_nothing,
        task="language",
    ),
    Bug(
        "weights-silently-not-loaded",
        ("pytorch/examples#1029",),
        "The file's names began with the wrapper's prefix, and load_state_dict(strict=False) passed over all of them. "
        "The model computed with random weights, without a word.",
        "ddp",
        "loss",
        GROUP,
        patch=mutations.names_do_not_fit,
        prepare=mutations.load_trained,
    ),
    # Resuming
    Bug(
        "resumed-in-the-first-epoch-s-order",
        ("huggingface/accelerate#2016", "huggingface/accelerate#4071"),
        "Resumed within a later epoch, the data came in the order of the first one: some samples were seen twice, and "
        "others not at all.",
        "ddp",
        "loss",
        GROUP | FEW,
        patch=mutations.starts_at(lambda step, per_epoch: step % per_epoch),
        interrupt=3,
    ),
    Bug(
        "resumed-at-the-next-epoch",
        ("Lightning-AI/pytorch-lightning#5325",),
        "Resumed within an epoch, the training went on with the next one: the rest of the epoch was never seen.",
        "ddp",
        "loss",
        GROUP | FEW,
        patch=mutations.starts_at(lambda step, per_epoch: -(-step // per_epoch) * per_epoch),
        interrupt=3,
    ),
    Bug(
        "resumed-from-the-epoch-s-start",
        ("KempnerInstitute/KempnerForge#51", "hiyouga/EasyR1#57"),
        "The checkpoint had no place in the data: each resume read the epoch from its start again. Samples at the start "
        "were seen more often than those at the end.",
        "ddp",
        "loss",
        GROUP,
        patch=mutations.starts_at(lambda step, per_epoch: step - step % per_epoch),
        interrupt=3,
    ),
    Bug(
        "moments-lost-on-resume",
        ("KempnerInstitute/KempnerForge#115", "EvolvingLMMs-Lab/OneVision-Encoder#65"),
        "The optimizer's moments were not restored, as a new optimizer has no tensors yet into which they could be read. "
        "Weights, schedule and data were; each resume began with moments of zero, and the loss jumped.",
        "ddp",
        "weights",
        GROUP,
        edits=((LOOPS, LOOPS + "        run.step == 3 and optimizer.state.clear()\n"),),
        interrupt=3,
    ),
    Bug(
        "schedule-begins-anew",
        ("lightly-ai/lightly-train#301", "torch-points3d/torch-points3d#630"),
        "The schedule's state was not restored: each resume began with the learning rate of the first step.",
        "ddp",
        "weights",
        GROUP,
        patch=mutations.schedule_begins_anew,
        interrupt=3,
    ),
)
