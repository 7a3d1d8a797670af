"""Runs checks in two processes that share one process group, and hands back what each rank found."""

import os
import socket
import sys
import traceback

import torch


def run_on_two_ranks(checks, folder):
    """Call each of `checks` (by name) on two ranks; return what they returned, by name, for both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        torch.multiprocessing.get_context("fork").Process(target=_rank, args=(r, port, checks, folder)) for r in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        if child.is_alive():  # one waits for the other, which has gone another way: no file of results then
            child.kill()
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def _rank(rank, port, checks, folder):
    # as torchrun would start it: Lightning then makes no processes of its own and keeps the group
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            if "Timed out" in str(error):
                break
    torch.save(found, f"{folder}/rank{rank}.pt")
    os._exit(0)
