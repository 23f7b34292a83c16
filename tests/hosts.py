"""train.py as several processes that find each other over loopback."""

import os
import socket
import subprocess
import sys

from tests.command import ROOT, TINY, Ended

SMALL = [
    TINY,
    "--config.model.depth=1",
    "--config.learner=measured",
    "--config.compare=('closed_form','algorithm1')",
    "--config.backbone.steps=8",
    "--config.backbone.warmup=2",
    "--config.control.steps=0",
    "--config.denoise.train_steps=4",
    "--config.denoise.divide_optimizer=True",
    "--config.denoise.moment_images=300",
    "--config.measured.images=130",  # five folds of 26 images on eight devices
    "--config.measured.vectors=3",  # so that a sample is taken
    "--config.select.images=77",
    "--config.select.strengths=(0.5,1.0)",
    "--config.evaluate.conditions=('clean',)",
    "--config.evaluate.resamples=100",
    "--config.latency_rounds=1",
]
"""A job of all stages in a few seconds of arithmetic; no number of images divides by the batches or the devices."""


def begin(script, arguments, *, devices, processes=1, heartbeat=30):
    """Starts a script as so many processes of so many devices each.

    Args:
      script: its name.
      arguments: which process ↦ its own arguments.
      devices: of each process.
      processes: how many.
      heartbeat: seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    started = []
    for which in range(processes):
        together = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={which}"]
        command = [sys.executable, str(ROOT / script), *arguments(which)]
        if processes > 1:
            command += [*together, f"--heartbeat={heartbeat}"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, **streams))
    return started


def end(started, timeout=500):
    """Waits for processes and returns how they ended; what gloo prints of its connections is left out."""
    found = []
    for process in started:
        try:
            output, messages = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for one in started:
                one.kill()
            raise
        output = "".join(line for line in output.splitlines(True) if not line.startswith("[Gloo]"))
        found.append(Ended(process.returncode, output, messages))
    return found
