"""Train a student: accelerate launch fastdcd/train.py --config configs/X.yaml [--set section.key=value ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by path: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from accelerate import Accelerator
from torch import Tensor

from fastdcd import checkpoint, cli, config_file, experiment, resume, run_folder, start_summary
from fastdcd.checkpoint import Progress, Saved
from fastdcd.config import Config
from fastdcd.evaluate import Accuracy, evaluate
from fastdcd.metrics import MetricsWriter, Stopwatch
from fastdcd.progress import ProgressBar
from fastdcd.step import TrainStep
from fastdcd.stopping import StopRequest
from fastdcd.teacher_modes import open_mode
from pipelines.prefetch import prefetch


def train(cfg: Config) -> dict[str, Any]:
    """Run an experiment, from its newest checkpoint if asked to. Returns its summary.

    Raises ValueError for anything the user can mend: a config, dataset, checkpoint or cache that does not fit.
    """
    assert cfg.run.dir is not None
    accelerator = experiment.make_accelerator(cfg)
    with run_folder.hold(cfg.run.dir, accelerator):
        saved = run_folder.to_resume(cfg.run.dir, cfg.train.resume, accelerator)
        return _train(cfg, accelerator, saved)


def _train(cfg: Config, accelerator: Accelerator, saved: Saved | None) -> dict[str, Any]:
    assert cfg.run.dir is not None
    train_set, val_set = experiment.open_data(cfg, accelerator)
    with train_set, val_set, StopRequest(accelerator) as stop:
        # ---- the parts
        class_names = train_set.index.classes
        classes = len(class_names)
        family = experiment.view_family(cfg)
        steps_per_epoch = experiment.steps_per_epoch(cfg, train_set.index)
        teacher = experiment.build_teacher(cfg, classes, accelerator)
        module = experiment.build_student(cfg, classes, teacher, accelerator)
        start_summary.check_batches(cfg, module, train_set.index, accelerator.num_processes)
        step = TrainStep(cfg, module, accelerator, steps_per_epoch=steps_per_epoch)
        progress, origin = Progress(), experiment.origin(train_set, teacher)
        if saved:
            changes = resume.compare(saved, cfg, origin, steps_per_epoch=steps_per_epoch)
            progress = checkpoint.restore(saved, module, step.optimizer, accelerator.scaler)
            accelerator.print(f"resumed from {saved.path}: epoch {progress.epoch}, step {progress.step}")
            for change in changes:
                accelerator.print(f"  {change}")
        experiment.write_config(cfg, accelerator)
        mode = open_mode(cfg, train_set, family, teacher, accelerator)
        metrics = MetricsWriter(cfg.run.dir / "metrics.jsonl", accelerator, resume_step=progress.step)
        teacher_accuracy: Accuracy | None = None
        if teacher and teacher.classes and cfg.teacher.evaluate:
            teacher_accuracy = evaluate(teacher, val_set, accelerator, cfg.eval, size=teacher.size, stop=stop.poll)
            if teacher_accuracy and not progress.step:
                metrics.write("teacher", epoch=0, step=0, **teacher_accuracy._asdict())
        facts = start_summary.facts(cfg, accelerator, train_set, val_set, module, teacher, teacher_accuracy)
        accelerator.print(start_summary.text(cfg, facts))
        watch = Stopwatch(progress.seconds)
        accuracy: Accuracy | None = None
        averaged: Accuracy | None = None  # of the student's moving average

        def now() -> Progress:
            return replace(progress, seconds=watch.seconds)

        def save() -> None:
            mode.flush()
            checkpoint.save(cfg, origin, now(), module, step.optimizer, accelerator)

        def measure(predict: Callable[[Tensor], Tensor]) -> Accuracy | None:
            module.eval()
            return evaluate(predict, val_set, accelerator, cfg.eval, size=cfg.eval_size, stop=stop.poll)

        def evaluate_student() -> tuple[Accuracy | None, Accuracy | None]:  # the second: of its moving average
            return measure(module.predict), measure(module.predict_average) if module.average is not None else None

        def limit_reached() -> bool:
            return 0 < cfg.train.max_steps <= progress.step

        # ---- the loop
        bar = ProgressBar(
            "train",
            cfg.train.epochs * steps_per_epoch,
            "steps",
            initial=progress.step,
            shown=accelerator.is_main_process,
        )
        while progress.epoch < cfg.train.epochs and not (stop.requested or limit_reached()):
            epoch, student_size = progress.epoch, cfg.student_size(progress.epoch)
            plan = experiment.epoch_plan(cfg, train_set, family, epoch)
            teacher_size = mode.begin(plan.view)
            rank_plan = plan.for_rank(
                experiment.image_sizes(student_size, teacher_size),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                start_step=progress.step_in_epoch,
            )
            step.wrapped.train()
            watch.start()
            batches = prefetch(train_set.epoch(rank_plan), mode.read_cached, accelerator.device)
            for batch, cached in watch.data_wait(batches):
                teacher_outputs = mode.outputs(batch, cached)
                images, labels = batch.at(student_size), batch.labels
                rows = plan.rows(progress.step_in_epoch)  # of all processes
                step(images, labels, teacher_outputs, mixed=batch.mixed, rows=rows, number=progress.step)

                watch.count(rows)
                progress = progress.after_step(teacher_images=rows if teacher_size else 0)
                bar.update()
                last = progress.step_in_epoch == plan.steps
                if progress.step % cfg.train.log_every == 0 or last:
                    values, (waits,) = step.take_metrics((watch.waited,))  # waits for the device
                    rates = watch.take(waits)
                    rate = step.learning_rate(progress.step - 1)
                    metrics.write("train", epoch=epoch, step=progress.step, lr=rate, **values, **rates)
                    bar.note(_in_short(rates, accuracy))
                    step.check(values["skipped_in_a_row"])
                if stop.poll() or last or limit_reached():
                    break
                if cfg.train.checkpoint_every and progress.step % cfg.train.checkpoint_every == 0:
                    save()
            batches.close()
            watch.stop()
            experiment.broadcast_buffers(module)

            # ---- the end of an epoch
            if progress.step_in_epoch == plan.steps:
                mode.end()
                if (epoch + 1) % cfg.eval.every == 0 or epoch + 1 == cfg.train.epochs:
                    accuracy, averaged = evaluate_student()
                    if accuracy is None or (module.average is not None and averaged is None):
                        # asked to stop: evaluated when the run resumes
                        save()
                        break
                    progress = replace(progress, best_top1=max(progress.best_top1, accuracy.top1))
                    ema = {f"ema_{name}": value for name, value in averaged._asdict().items()} if averaged else {}
                    metrics.write("eval", epoch=epoch, step=progress.step, **accuracy._asdict(), **ema)
                    bar.note(f"epoch {epoch + 1}, top-1 {accuracy.top1:.2f} %")
                progress = replace(progress, epoch=epoch + 1, step_in_epoch=0)
                metrics.write("epoch", epoch=epoch, step=progress.step, seconds=watch.seconds)
            save()
        bar.close()
        mode.close()

        # ---- the results
        finished = progress.epoch == cfg.train.epochs
        if finished and accuracy is None:  # resumed when all was done
            accuracy, averaged = evaluate_student()
        metrics.close()
        accelerator.end_training()
        summary = experiment.write_results(
            cfg, accelerator, module, now(), accuracy, averaged, teacher_accuracy, finished, class_names
        )
    if finished and accuracy:
        accelerator.print(
            f"done: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %; results in {cfg.run.dir}"
        )
    else:
        accelerator.print(f"stopped at step {progress.step}; everything is saved; continue with --resume auto")
    return summary


def _in_short(rates: dict[str, Any], accuracy: Accuracy | None) -> str:
    """The newest figures, for the progress bar."""
    reached = f", top-1 {accuracy.top1:.2f} %" if accuracy else ""
    return f"{rates['images_per_second']:,.0f} images/s, data wait {rates['data_wait']:.0%}{reached}"


def main() -> int:
    parser = argparse.ArgumentParser(
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
    cli.run(main, again="--resume auto continues from the newest checkpoint in run.dir, if there is one")
