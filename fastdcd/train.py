"""Train a student: accelerate launch fastdcd/train.py --config configs/X.yaml [--set section.key=value ...]"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastdcd import checkpoint, cli, config_file, experiment
from fastdcd.checkpoint import Progress
from fastdcd.config import Config
from fastdcd.evaluate import Accuracy, evaluate
from fastdcd.guard import GuardedStep
from fastdcd.metrics import MetricsWriter, RunningMeans, Stopwatch
from fastdcd.models import ModelOutput
from fastdcd.optim import build_optimizer
from fastdcd.schedule import learning_rate, set_learning_rate
from fastdcd.stopping import StopRequest
from fastdcd.teacher_modes import open_mode
from pipelines.base import Batch
from pipelines.prefetch import prefetch


def train(cfg: Config) -> dict[str, Any]:
    """Run an experiment, from its newest checkpoint if asked to. Returns its summary.

    Raises ValueError for anything the user can mend: a config, dataset, checkpoint or cache that does not fit.
    """
    assert cfg.run.dir is not None
    resume_from = checkpoint.find(cfg.run.dir / "checkpoints", cfg.train.resume)
    accelerator = experiment.make_accelerator(cfg)
    train_set, val_set = experiment.open_data(cfg, accelerator)
    with train_set, val_set, StopRequest(accelerator) as stop:
        # ---- the parts
        classes = len(train_set.index.classes)
        family = experiment.view_family(cfg)
        teacher = experiment.build_teacher(cfg, classes, accelerator)
        module = experiment.build_student(cfg, classes, teacher, accelerator)
        wrapped, optimizer = accelerator.prepare(module, build_optimizer(module, cfg.optim))
        progress = Progress()
        if resume_from:
            progress = checkpoint.restore(resume_from, module, optimizer, accelerator.scaler)
            accelerator.print(f"resumed from {resume_from}: epoch {progress.epoch}, step {progress.step}")
        experiment.write_config(cfg, accelerator)
        mode = open_mode(cfg, train_set, family, teacher, accelerator)
        mode.images_seen = progress.teacher_images
        if teacher and cfg.teacher.evaluate:
            found = evaluate(teacher, val_set, accelerator, cfg.eval, size=teacher.size)
            accelerator.print(f"teacher {teacher.name}: top-1 {found.top1:.2f} % on {cfg.data.val}")
        metrics = MetricsWriter(cfg.run.dir / "metrics.jsonl", accelerator, resume_step=progress.step)
        guard = GuardedStep(module, optimizer, accelerator, limit=cfg.train.max_skipped)
        means, watch = RunningMeans(), Stopwatch(progress.seconds)
        accuracy: Accuracy | None = None

        def now() -> Progress:
            return replace(progress, seconds=watch.seconds, teacher_images=mode.images_seen)

        def save() -> None:
            mode.flush()
            checkpoint.save(cfg, now(), module, optimizer, accelerator)

        # ---- the loop
        steps_an_epoch = experiment.epoch_plan(cfg, train_set, family, 0).steps
        bar = tqdm(
            total=cfg.train.epochs * steps_an_epoch,
            initial=progress.step,
            unit="step",
            disable=None if accelerator.is_main_process else True,
        )
        while progress.epoch < cfg.train.epochs and not stop.requested:
            epoch = progress.epoch
            plan = experiment.epoch_plan(cfg, train_set, family, epoch)
            rank_plan = plan.for_rank(
                experiment.image_sizes(cfg.student_size(epoch), mode.begin(epoch)),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                start_step=progress.step_in_epoch,
            )
            wrapped.train()
            watch.start()
            batches = prefetch(train_set.epoch(rank_plan), mode.read_cached, accelerator.device)
            for batch, rows in watch.data_wait(batches):
                rate = learning_rate(
                    progress.step,
                    steps_an_epoch,
                    epochs=cfg.train.epochs,
                    schedule=cfg.schedule,
                    peak=cfg.optim.lr,
                )
                set_learning_rate(optimizer, rate)
                images = plan.rows(progress.step_in_epoch)  # of all processes
                teacher_outputs = mode.outputs(batch, rows)
                terms = backward(wrapped, batch, teacher_outputs, images, accelerator, cfg.train.accumulate)
                if cfg.train.clip:
                    accelerator.clip_grad_norm_(wrapped.parameters(), cfg.train.clip)
                guard.step()
                optimizer.zero_grad(set_to_none=True)
                module.after_step()

                means.add(terms, taken=guard.finite)
                watch.count(images)
                progress = replace(progress, step=progress.step + 1, step_in_epoch=progress.step_in_epoch + 1)
                bar.update()
                last = progress.step_in_epoch == plan.steps
                votes = None
                if progress.step % cfg.train.log_every == 0 or last:
                    # waits for the device
                    values, waits = means.take(accelerator, {**guard.take(), **stop.vote()}, watch.waited)
                    votes = values.pop("stop")
                    rates = watch.take(waits)
                    metrics.write("train", epoch=epoch, step=progress.step, lr=rate, **values, **rates)
                    reached = f", top-1 {accuracy.top1:.2f} %" if accuracy else ""
                    bar.set_postfix_str(
                        f"{rates['images_per_second']:,.0f} images/s, data wait {rates['data_wait']:.0%}{reached}"
                    )
                    guard.check(values["skipped_in_a_row"])
                stop.poll(progress.step, limit=cfg.train.max_steps, votes=votes)
                if stop.requested or last:
                    break
                if cfg.train.checkpoint_every and progress.step % cfg.train.checkpoint_every == 0:
                    save()
            batches.close()
            watch.stop()
            experiment.broadcast_buffers(module)

            # ---- the end of an epoch
            if progress.step_in_epoch == plan.steps:
                progress = replace(progress, epoch=epoch + 1, step_in_epoch=0)
                mode.end()
                if progress.epoch % cfg.eval.every == 0 or progress.epoch == cfg.train.epochs:
                    module.eval()
                    accuracy = evaluate(module.predict, val_set, accelerator, cfg.eval, size=cfg.eval_size)
                    progress = replace(progress, best_top1=max(progress.best_top1, accuracy.top1))
                    metrics.write("eval", epoch=epoch, step=progress.step, **accuracy._asdict())
                    bar.set_postfix_str(f"epoch {progress.epoch}, top-1 {accuracy.top1:.2f} %")
                metrics.write("epoch", epoch=epoch, step=progress.step, seconds=watch.seconds)
            save()
        bar.close()
        mode.close()

        # ---- the results
        finished = progress.epoch == cfg.train.epochs
        if finished and accuracy is None:  # resumed when all was done
            module.eval()
            accuracy = evaluate(module.predict, val_set, accelerator, cfg.eval, size=cfg.eval_size)
        metrics.close()
        accelerator.end_training()
        summary = experiment.write_results(cfg, accelerator, module, now(), accuracy, finished)
    if finished and accuracy:
        accelerator.print(
            f"done: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %; results in {cfg.run.dir}"
        )
    else:
        accelerator.print(f"stopped at step {progress.step}; everything is saved, go on with --resume auto")
    return summary


def backward(
    wrapped: torch.nn.Module,
    batch: Batch,
    teacher_outputs: ModelOutput | None,
    rows: int,
    accelerator: Accelerator,
    parts: int,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one batch, split into `parts`; returns its named loss terms.

    `rows` is the batch's size over all processes: every term is a sum over local rows divided by
    rows / processes, so that DDP's mean over processes is the mean over the whole batch.
    """
    divisor = rows / accelerator.num_processes / parts
    images, labels = batch.images[0].tensor_split(parts), batch.labels.tensor_split(parts)
    known = (
        [None] * parts
        if teacher_outputs is None
        else [
            ModelOutput(*pair)
            for pair in zip(*(tensor.tensor_split(parts) for tensor in teacher_outputs), strict=True)
        ]
    )
    means = RunningMeans()
    for part in range(parts):
        # gradients of DDP travel once a batch, with its last part
        with nullcontext() if part == parts - 1 else accelerator.no_sync(wrapped):
            terms = wrapped(images[part], labels[part], known[part], divisor)
            accelerator.backward(terms["loss"] / parts)
        means.add(terms)
    return means.on_device()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a student as a config says, with or without a teacher.",
        epilog="example: accelerate launch fastdcd/train.py --config configs/cifar100/resnet8x4.yaml --set run.seed=1",
    )
    config_file.add_arguments(parser)
    parser.add_argument("--resume", metavar="WHAT", help="none, auto, or a checkpoint: train.resume")
    arguments = parser.parse_args()
    overrides = [*arguments.set, *([f"train.resume={arguments.resume}"] if arguments.resume else [])]
    train(config_file.load(arguments.config, overrides))
    return 0


if __name__ == "__main__":
    cli.run(main)
