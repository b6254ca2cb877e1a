"""Being a rank: find the frozen config, join the others, train, leave with an exit code and at most one traceback."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from lockstep.config import own_files, run_directory, unfinished
from lockstep.config.declared import read_config
from lockstep.config.schema import LONGEST_WAIT, Config, to_yaml
from lockstep.data.worker_errors import WorkerFailed
from lockstep.diagnose import out_of_memory
from lockstep.diagnose.verdict import describe_failure
from lockstep.diagnose.watchdog import Watchdog, WatchdogTimeout
from lockstep.distributed import process_group
from lockstep.distributed.collective_errors import lost_a_peer, timed_out
from lockstep.distributed.devices import agree_on_devices, resolve_device
from lockstep.distributed.environment import LAUNCHER, RUN_DIRECTORY, TRIAL, Place
from lockstep.distributed.heartbeat import Heartbeat
from lockstep.distributed.host_logs import begin_log, end_log
from lockstep.distributed.rendezvous import check_in, open_store
from lockstep.distributed.signals import PREEMPTED, Listener, Preempted, alone_under_srun, end_with_parent, unsaved
from lockstep.distributed.store import from_rank_0, leave_store, run_briefly
from lockstep.errors import Busy, UserError
from lockstep.launch.validate import validate
from lockstep.run import Run
from lockstep.utils import files, standard_streams, temporary
from lockstep.utils.places import as_installed
from lockstep.utils.system import system_info

if TYPE_CHECKING:
    from lockstep.recipe import Recipe


ALONE = (out_of_memory.OutOfMemory, WorkerFailed)  # what one rank may meet, and the others not
COMPOSE_SECONDS = 3600.0  # rank 0 may list a million images, or download them, before the others learn the config


def work(recipe: Recipe, place: Place) -> NoReturn:
    """Join the others, train, and leave with the exit code.

    A rank's last line is an os._exit: gloo's threads can abort the interpreter's own exit after all has gone well
    (pytorch issue 190489).
    """
    started, code, out = time.perf_counter(), 0, None
    console = os.dup(2)
    watchdog: Watchdog | None = None

    def say(words: str) -> None:
        if place.rank == 0:
            standard_streams.write_to(console, f"{words}\n")

    def leave(error: BaseException, code: int, told_to_stop: bool = False) -> NoReturn:
        tell(error, place, out, console, told_to_stop)
        if isinstance(error, WatchdogTimeout):
            error.continue_stopped()
        if out is not None and place.rank == 0 and not isinstance(error, Busy):
            seconds = time.perf_counter() - started
            run_briefly(lambda: run_directory.note_failure(out, recipe.name, place.world_size, seconds))
        temporary.exit_at_once(code)

    def asks(error: BaseException) -> bool:
        return timed_out(error) or (lost_a_peer(error) and not listener.received)

    listener = Listener(say, launched=LAUNCHER in os.environ)
    try:
        end_with_launcher()
        try:
            config, out, store, hosts = frozen_config(recipe, place)
        except SystemExit as asked:  # --help and the like have printed what they were asked for
            sys.stdout.flush()
            os._exit(asked.code if isinstance(asked.code, int) else 0)
        if place.rank:
            try:
                redirect_output(begin_log(out / "ranks", place.rank, config.logs, hosts))
            except FileNotFoundError:
                raise unseen(out) from None
        heartbeat = Heartbeat(out / "ranks", place.rank)
        watchdog = Watchdog(
            heartbeat,
            out / "ranks",
            store,
            place.world_size,
            config.timeout_seconds,
            end=lambda verdict: leave(verdict, verdict.exit_code),
            say=say,
            overdue=resolve_device(config.device, config.backend)[1] == "nccl",
            signalled=lambda: listener.received,
        )
        join_and_train(recipe, config, out, store, place, hosts, listener, heartbeat)
        watchdog.close()
        process_group.leave_in_time(config.timeout_seconds)
        dist.destroy_process_group()
    except Preempted:
        code = PREEMPTED
        if watchdog:
            watchdog.close()
        stop_agent(place)
    except BaseException as error:
        if watchdog and asks(error):
            watchdog.heartbeat.update(asked=True)  # a launcher's SIGTERM may come, and from here on it ends this rank
        listener.close()
        code = error.exit_code if isinstance(error, UserError) else 1
        if listener.received and lost_a_peer(error):
            code = unsaved(listener.received)  # asked to leave, and another rank already has
        asking = watchdog is not None and asks(error)  # whether a signal came is certain only now
        if alone_under_srun():  # whose SIGTERM, because a rank has failed, must not replace exit code or last words
            signal.signal(signal.SIGTERM, (lambda *_: os._exit(code)) if asking else signal.SIG_IGN)
        if watchdog and asking:
            # Where another rank broke first, it, or the launcher that sees it dead, is to be heard first. An agent ends
            # this rank meanwhile, however slow the machine.
            patience = 5.0 if "TORCHELASTIC_ERROR_FILE" in os.environ else 2.0
            error = watchdog.ask(error, patience if lost_a_peer(error) else 0)
        elif watchdog:
            watchdog.close(f"{type(error).__name__}: {error}")
            if fails_alone(error):
                watchdog.tell()
        leave(error, code, told_to_stop=bool(listener.received))
    temporary.exit_at_once(code)


def fails_alone(error: BaseException) -> bool:
    """Whether other ranks are to be told, because they have not failed alike and nobody ends them: neither a launcher of
    ours nor torchrun. A mistake and a failed check are the same on all ranks; memory or a worker fails on one."""
    started = LAUNCHER in os.environ or "TORCHELASTIC_ERROR_FILE" in os.environ
    return not started and (isinstance(error, ALONE) or not isinstance(error, UserError))


def preload() -> None:
    """Load what every rank will, in the process whose copies they are to be."""
    for module in ("torchvision.models", "torch._dynamo"):  # the models; whatever wraps or steps an optimizer
        importlib.import_module(module)


def end_with_launcher() -> None:
    """Have this rank end when its launcher is killed."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    end_with_parent()
    if os.getppid() != int(launcher):
        os._exit(1)  # it was killed while this rank was still importing


def stop_agent(place: Place) -> None:
    """Have torchrun's agent end: it would take ranks that leave for ranks that broke, and start them again."""
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - place.attempt
    if place.agent_store and LAUNCHER not in os.environ and left > 0 and os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)


def join_and_train(
    recipe: Recipe,
    config: Config,
    out: Path,
    store: dist.Store,
    place: Place,
    hosts: list[str],
    listener: Listener,
    heartbeat: Heartbeat,
) -> None:
    """Join the process group and run the recipe's function."""
    # A requeued job's earlier ranks may still sit on a node that Slurm has lost, until their own time-out.
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    lock = run_directory.lock(out, config.timeout_seconds if requeued else 0) if place.rank == 0 else None
    local_rank = os.environ.get("LOCAL_RANK")
    if config.compile:
        temporary.own_compile_cache()
    here = process_group.join_process_group(
        store,
        place.rank,
        place.world_size,
        device=config.device,
        backend=config.backend,
        timeout_seconds=config.timeout_seconds,
        threads=config.threads,
        tf32=config.tf32,
        local_rank=int(local_rank) if local_rank is not None else None,
        hosts=hosts,
        heartbeat=heartbeat,
    )
    if here.rank == 0:
        files.write_json(out / "environment.json", system_info(here.hosts, str(here.device), here.backend))
    carry_out(recipe, Run(recipe.name, config, here, out, recipe.next_command, listener=listener))
    del lock


def carry_out(recipe: Recipe, run: Run) -> None:
    """Run the recipe's function; an error that only says that there is no memory left ends with what holds it.

    Raises:
        oom.OutOfMemory: the page.
    """
    if TRIAL in os.environ:
        shorten(run)
    try:
        recipe(run)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.is_out_of_memory(error, run.device):
            raise
        raise out_of_memory.explain_out_of_memory(error, run) from None


def shorten(run: Run) -> None:
    """In a rank of a trial: evaluate one batch a rank, and take no more of a GPU than is allowed."""
    config = run.config
    run.data.limit_evaluation()
    if run.device.type == "cuda":
        rooms = []
        for gpu in run.world.own_gpus:  # a recipe may use more than this rank's first
            free, total = torch.cuda.mem_get_info(gpu)
            rooms.append(int(config.memory_fraction * free))
            torch.cuda.set_per_process_memory_fraction(rooms[-1] / total, gpu)
        run.note("", trial_room_bytes=rooms[0])


def frozen_config(recipe: Recipe, place: Place) -> tuple[Config, Path, dist.Store, list[str]]:
    """The run's config and directory, the store where the ranks meet, and the host of each.

    A launcher of ours has put both on disk. Where the ranks were started by hand there is nothing yet: rank 0 composes,
    checks, and makes the directory when it is known that each rank has a device, and tells the others over the store.
    """
    if RUN_DIRECTORY in os.environ:
        out = Path(os.environ[RUN_DIRECTORY])
        try:
            config = read_config(recipe, (out / "config.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise unseen(out) from None
        store, hosts, _ = meet(place, config.timeout_seconds)
        return config, out, store, hosts
    asked = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("timeout_seconds=")]
    seconds = float(asked[-1] if asked and asked[-1].isdecimal() else Config().timeout_seconds)
    seconds = min(seconds, LONGEST_WAIT)  # what is longer is refused when it is composed
    store, hosts, known = meet(place, seconds, recall())  # first of all: where a rank is missing, nothing is created
    name = next(filter(None, known), "")
    told = from_rank_0(
        store, place.rank, "run", lambda: compose_by_hand(recipe, place.world_size, name), COMPOSE_SECONDS
    )
    if "config" in told:
        config = read_config(recipe, told["config"])
        local_rank = int(os.environ.get("LOCAL_RANK", hosts[: place.rank].count(hosts[place.rank])))
        before = dist.PrefixStore("before", store)
        agree_on_devices(before, place.rank, hosts, local_rank, config.device, config.backend, seconds)
        told = from_rank_0(store, place.rank, "directory", lambda: enter_directory(recipe, config), COMPOSE_SECONDS)
        if "out" in told:
            remember(told["out"])
            return config, Path(told["out"]), store, hosts
    leave_store(store, place.rank, place.world_size)
    if "error" not in told:
        raise SystemExit(0)
    # Rank 0 says it; the others too where an agent shows one rank's words and picks the rank itself.
    says = place.rank == 0 or "TORCHELASTIC_ERROR_FILE" in os.environ
    raise UserError(told["error"] if says else "rank 0 refused the config")


def unseen(out: Path) -> UserError:
    """What a rank says that does not find the run directory, which was made on another host."""
    return UserError(
        f"out={out}: not there on {socket.gethostname()}; set out to a folder on a file system that all hosts mount"
    )


def meet(place: Place, timeout_seconds: float, note: str = "") -> tuple[dist.Store, list[str], list[str]]:
    """(this start's part of the store, every rank's host, every rank's note), when all ranks have come."""
    store = open_store(place, timeout_seconds)
    return check_in(store, place.rank, place.world_size, timeout_seconds, note, place.nodes, not place.agent_store)


def agent_folder() -> Path | None:
    """The folder that torchrun's agent on this host keeps as long as it lives: it holds a folder an attempt."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[2] if error_file else None


def remember(out: str) -> None:
    """Note the run directory where the ranks that this agent may start after these will look for it."""
    folder = agent_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            files.write_atomically(folder / "lockstep-run", out)


def recall() -> str:
    """The run directory of the ranks that this agent started before; empty for the first ones.

    Ranks that torchrun restarts, perhaps on more or fewer hosts, must go on in it, whatever its name.
    """
    folder = agent_folder()
    note = folder / "lockstep-run" if folder is not None else None
    return note.read_text(encoding="utf-8") if note is not None and note.is_file() else ""


def compose_by_hand(recipe: Recipe, world_size: int, known: str) -> dict[str, str]:
    """Compose and check, on rank 0 of ranks that were started by hand; return what the others need.

    Args:
        known: the run directory of an earlier attempt, or nothing.

    Returns:
        `config`, or `error`, or nothing where Hydra has only printed something (--help, --cfg).
    """
    told: dict[str, str] = {}

    def keep(config: Config) -> None:
        there = config.cluster
        if there and there.tasks_per_node and there.nodes * there.tasks_per_node != world_size:
            raise UserError(
                f"cluster.nodes={there.nodes} cluster.tasks_per_node={there.tasks_per_node}: {world_size} ranks were "
                "started; leave both out, or start as many"
            )
        config = replace(config, cluster=None)  # it has done its part, and the run can be continued anywhere
        validate(config, recipe, world_size)
        resolve_device(config.device, config.backend)
        unfinished.offer_or_continue(config, recipe.name)
        told["config"] = to_yaml(config)

    try:
        if known:
            config = read_config(recipe, (Path(known) / "config.yaml").read_text(encoding="utf-8"))
            config.out = known
            keep(config)
            return told
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise UserError("--multirun: a sweep starts its own ranks; run it with python, not inside torchrun")
        from lockstep.config.compose import compose  # Hydra: only who composes imports it

        compose(recipe, keep)
    except UserError as error:
        return {"error": str(error)}
    except SystemExit:
        return {}
    return told


def enter_directory(recipe: Recipe, config: Config) -> dict[str, str]:
    """Make the run directory, as rank 0 of ranks that were started by hand: `out`, `error`, or nothing to be done."""
    try:
        out = run_directory.freeze(config, recipe.name)
    except UserError as error:
        return {"error": str(error)}
    if out is None:
        print(run_directory.already_finished(config))
        return {}
    return {"out": str(out)}


def redirect_output(log: Path) -> None:
    """Send all this process prints, C++ included, to its log: of many ranks only rank 0 speaks on the console."""
    descriptor = own_files.descriptor_of(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def tell(error: BaseException, place: Place, out: Path | None, console: int, told_to_stop: bool = False) -> None:
    """Put an error into the rank's log, and before the user exactly once.

    Args:
        console: a descriptor of the stderr this process was started with.
        told_to_stop: a signal has come, as from a launcher that has seen another rank die.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    mistake = isinstance(error, UserError) or full
    text = as_installed(f"error: {error}\n") if mistake else "".join(traceback.format_exception(error))
    if full:
        text = f"error: out={out}: {os.strerror(error.errno)}; make room, then start the same command again\n"  # type: ignore[attr-defined]
    if out is not None:
        run_briefly(lambda: end_log(out / "ranks", place.rank, text))
    if told_to_stop and lost_a_peer(error):
        return
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        # An agent started this rank and reads this file; our launcher, or torchrun's summary, shows the first failing
        # rank's. The format is torch.distributed.elastic's (multiprocessing/errors/error_handler.py).
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}), encoding="utf-8")
            return
    if isinstance(error, WatchdogTimeout) and not error.prints and alone_under_srun():  # whose tasks share one console
        return
    if isinstance(error, WatchdogTimeout) and not error.prints:
        text = f"rank {place.rank} stopped because another rank did: {str(error).splitlines()[0]}\n"
    elif not mistake:
        where = describe_failure(out, place.rank)[0] if out is not None else ""
        text = f"rank {place.rank} failed{where}\n{text}"
    standard_streams.write_to(console, text)
