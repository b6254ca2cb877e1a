"""The clock in every contestant, whoever wrote it: Python imports this file at its start if PYTHONPATH has its folder.

With BENCHMARK_STEPS="warm:steps" it counts a process's updates by torch's own hook for all optimizers. After the first
one it tells the time; after `warm` + `steps` of them the seconds of the last `steps`, each from update to update,
whatever the loop did between two, and the CPU seconds of the whole process. What it tells goes into BENCHMARK_FILE.
"""

import importlib.util
import json
import os
import statistics
import sys
import time


def install(module):
    """Count, in a process in which `module`, torch.optim.optimizer, has just been imported."""
    warm, steps = map(int, os.environ["BENCHMARK_STEPS"].split(":"))
    moments, spent = [], [0.0]

    def tick(optimizer, args, kwargs):
        moments.append(time.perf_counter())
        if len(moments) == 1:
            tell(first_step=time.time(), cpu=time.process_time())
        if len(moments) == warm:
            spent[0] = time.process_time()
        if len(moments) == warm + steps:
            taken = [after - before for before, after in zip(moments[warm - 1 :], moments[warm:], strict=False)]
            cpu = (time.process_time() - spent[0]) / steps
            tell(mean=statistics.fmean(taken), median=statistics.median(taken), cpu_a_step=cpu)

    module.register_optimizer_step_post_hook(tick)


def tell(**facts):
    # By one write, so that two ranks' lines do not mix; into a file, since a rank's output may go to a log of its own.
    line = json.dumps(facts) + "\n"
    descriptor = os.open(os.environ["BENCHMARK_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


class Watch:
    def find_spec(self, name, path=None, target=None):
        if name != "torch.optim.optimizer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            install(module)

        spec.loader.exec_module = exec_module
        return spec


if "BENCHMARK_STEPS" in os.environ:
    sys.meta_path.insert(0, Watch())
