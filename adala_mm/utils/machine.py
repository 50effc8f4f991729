"""Facts of the machine and of this code, on which measured figures depend: processor, device, versions, commit."""
from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import torch


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def default_device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def total_memory(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def machine() -> dict[str, str | int]:
    """Processor, versions and commit."""
    model = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                  if line.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else ''
    return dict(cpu=model, cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
                commit=git('rev-parse', '--short', 'HEAD') or 'unknown')


def hardware(device: torch.device) -> dict[str, str | int]:
    """The facts of `machine`, the number of threads, and the device with the versions of its software."""
    facts = machine() | dict(threads=torch.get_num_threads())
    if device.type == 'cpu':
        return facts | dict(device=facts['cpu'])
    try:
        driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], check=False,
                                capture_output=True, text=True).stdout.split('\n')[0]
    except OSError:
        driver = ''
    triton = importlib.import_module('triton').__version__ if importlib.util.find_spec('triton') else 'none'
    return facts | dict(device=torch.cuda.get_device_name(device), driver=driver or 'unknown', cuda=torch.version.cuda,
                        cudnn=torch.backends.cudnn.version(), triton=triton)


def git_state() -> dict[str, str | bool | None]:
    """Commit of this code, and whether files differ from it; both are None outside of a checkout and without git."""
    changes = git('status', '--porcelain')
    return dict(commit=git('rev-parse', 'HEAD') or None, dirty=None if changes is None else bool(changes))


def git(*words: str) -> str | None:
    """The answer of git about the code that runs, whatever the current folder is; None if there is no answer.

    An installed package may lie inside of a repository that is not its own, for instance in its environment. Git does
    not track the package there, so the state of that repository says nothing about it.
    """
    here = Path(__file__)
    for command in (['ls-files', '--error-unmatch', here.name], words):
        try:
            done = subprocess.run(['git', *command], capture_output=True, text=True, cwd=here.parent)
        except OSError:
            return None
        if done.returncode:
            return None
    return done.stdout.strip()
