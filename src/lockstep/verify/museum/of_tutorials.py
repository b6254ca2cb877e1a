"""Mistakes that have been published in somebody's tutorial, each with the recipe that it breaks, a line and what replaces it."""

from __future__ import annotations

TUTORIALS: dict[str, tuple[str, str, str]] = {
    "gradients clipped to a length of 1, as DeepSpeed does by default": (
        "deepspeed_zero",
        '"gradient_clipping": (config.gradients.clip_norm or 0.0) if config.stage else 0.0,',
        "",
    ),
    "gradients that are a thousandth too small": (
        "deepspeed_zero",
        "engine.backward(loss * micro.weight,",
        "engine.backward(loss * micro.weight * 0.999,",
    ),
    "accumulation that does not weight its pieces": (
        "grad_accumulation",
        "scaler.scale(loss * micro.weight)",
        "scaler.scale(loss)",
    ),
    "one all-reduce left out": (
        "ddp",
        "with run.autocast():",
        "with model.no_sync() if run.step == 1 else run.autocast():",
    ),
    "ranks that train alone": (
        "ddp",
        "    model = DistributedDataParallel(model, device_ids=run.device_ids, gradient_as_bucket_view=True)\n",
        "",
    ),
    "BatchNorm left unsynchronised": (
        "sync_batchnorm",
        "model = convert_sync_batchnorm(model)",
        "convert_sync_batchnorm",
    ),
    "layers that Fabric was never given": (
        "lightning_fabric",
        "model = convert_sync_batchnorm(model)",
        "convert_sync_batchnorm(run.task.build_model())",
    ),
    "a loss that Fabric has rounded": (
        "lightning_fabric",
        "with fabric.autocast():",
        "if True:",
    ),
    "micro-batches that Lightning weighs alike": (
        "lightning_trainer",
        "return loss * micro.weight * self.trainer.accumulate_grad_batches",
        "return loss",
    ),
    "a plugin that Lightning was never given": (
        "lightning_trainer",
        "[SyncBatchNormPlugin()] if run.config.sync_batchnorm else []",
        "[]",
    ),
    "a stage's gradient of the wrong size": (
        "pipeline_parallel",
        "average_gradients(mine, data_group)",
        "[p.grad.mul_(1 if first else 0.5) for p in mine.parameters()]",
    ),
    "a frozen BatchNorm that model.train() wakes": (
        "transfer_learning",
        "    hold_statistics(model)\n",
        "",
    ),
    "layers unfrozen in silence": (
        "transfer_learning",
        "    freeze_parameters(model, run.config.freeze)\n",
        "    freeze_parameters(model, run.config.freeze if run.shards == 1 else [])\n",
    ),
    "shards cut from each rank's own memory": (
        "fsdp",
        "mine.placements)",
        "mine.placements, src_data_rank=None)",
    ),
    "replicas whose gradients are lost": (
        "data_parallel",
        "{name: tensor.clone() for name, tensor in self.module.named_parameters()}",
        "{n: t.clone() if number == 0 else t.detach() for n, t in self.module.named_parameters()}",
    ),
}
