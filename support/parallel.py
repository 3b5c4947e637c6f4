"""More than one GPU: `torchrun --nproc_per_node=4 train.py ...` starts as many processes, one for each.

All hold the same weights. Each has its share of the batch, and crops, old fakes and random numbers of its own; before
every step of an optimizer gradients are averaged. The first process alone measures, writes and prints.

What a loss takes of a whole batch, as adversarial_scaling and matching_loss do, is of a process's share. After Ctrl-C
torchrun gives them 30 seconds to save; TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 gives more.
"""
import atexit
import datetime
import os
import sys

import torch
import torch.distributed as dist

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
RANK, LOCAL_RANK, RANKS = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")) if LAUNCHED else (
    0, 0, 1)
if RANK:
    sys.stdout = open(os.devnull, "w")  # the first one says it


def join(networks, settings):
    """Meet the other processes, if there are any: all take the first one's weights, and go on with random numbers of
    their own."""
    if RANKS == 1:
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()  # which it is not on Windows
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                            timeout=datetime.timedelta(hours=2))  # the first one measures, the others wait
    atexit.register(give_up)
    for network in networks.values():
        for tensor in network.state_dict().values():
            first = tensor.contiguous()  # NCCL wants it so; in channels_last it is not
            dist.broadcast(first, 0)
            tensor.copy_(first)
    if settings["init_from"] != "resume":
        torch.manual_seed(settings["seed"] + RANK)


def give_up():
    """At an end that is an error: at once, for the others wait in vain until torchrun hears of it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def leave():
    """Where all processes end: at once, for torch's threads sometimes abort an interpreter that ends normally."""
    if RANKS > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def average_gradients(optimizer):
    """Replace the gradients by their means over the processes, all in one message."""
    if RANKS == 1:
        return
    gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]
                 if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= RANKS
    torch._foreach_copy_(gradients, [mean.view(gradient.shape) for mean, gradient in
                                     zip(flat.split([gradient.numel() for gradient in gradients]), gradients)])


def gather(state):
    """[a state of each process] in the first one, None in the others."""
    states = [None] * RANKS if RANK == 0 else None
    dist.gather_object(state, states)
    return states


def anywhere(flag):
    """Is it true in any process? All of them must ask."""
    if RANKS == 1:
        return flag
    flag = torch.tensor(int(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
