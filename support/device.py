"""What the machine can do: its device and number format, torch.compile, several GPUs, and CUDA graphs."""
import atexit
import datetime
import os
import sys
import traceback
from types import SimpleNamespace

import torch
import torch.distributed as dist

from support.config import fail, one_line

RANK, LOCAL_RANK, RANKS = 0, 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
    RANK, LOCAL_RANK, RANKS = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
if RANK:
    sys.stdout = open(os.devnull, "w")


def pick_device(name):
    """"auto" -> cuda if there is a GPU, else mps, else cpu. Fails if the named device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
        torch.backends.cudnn.benchmark = True  # finds the fastest kernels; crops always have one size
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device={name}: cannot be used here ({str(error).splitlines()[0]}); --device=auto picks one that can")


def pick_dtype(name, device):
    """"auto" -> a torch.dtype: bfloat16 where the hardware computes in it, float16 on older GPUs, else float32."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        name = "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        fail(f"--dtype={name}: must be auto, float32, bfloat16 or float16")
    return getattr(torch, name)


def pick_compile(name, device):
    """"auto" -> True on a GPU on which torch.compile works; where it does not, one line says why. Returns a bool."""
    if name.lower() not in ("auto", "true", "false"):
        fail(f"--compile={name}: must be auto, true or false")
    if name.lower() != "auto" or device.type != "cuda":
        return name.lower() == "true"
    try:  # Triton needs compute capability 7.0 and a C compiler; the smallest function shows whether both are there
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True
    except Exception as error:
        print(f"machine   not compiled, which is slower: {one_line(error, 200)}")
        return False


def compile_networks(compile, networks, vae, adversarial_scaling):
    """Compile each network, and the teacher's encoder, when it is first called, for the one shape of training. This
    replaces `forward`, because Module.compile does not work on an nn.Sequential. compile: False = leave them."""
    for network in networks + ([] if vae.video else [vae.vae.encoder]) if compile else []:
        network.forward = torch.compile(network.forward, dynamic=False)
    torch._functorch.config.donated_buffer = adversarial_scaling == "none"  # the others go through a graph twice


def explain_out_of_memory(settings):
    """From here on, one line explains an error that is due to a lack of memory. All others are shown as usual."""
    def explain(kind, error, trace):
        on_cpu = kind is RuntimeError and "DefaultCPUAllocator" in str(error)  # there it has no class of its own
        if not on_cpu and not issubclass(kind, (torch.OutOfMemoryError, MemoryError)):
            return sys.__excepthook__(kind, error, trace)
        large = ", ".join(f"--{name} ({settings[name]})" for name in ("batch_size", "crop", "window", "replay_size"))
        print(f"error: out of memory: a smaller {large} helps; checkpoints in {settings['out_dir']} are untouched",
              file=sys.stderr)
    sys.excepthook = explain


# --- several GPUs ----------------------------------------------------------------------------------------------------
# `torchrun --standalone --nproc_per_node=4 train.py ...` starts one process for each. Each trains on its
# share of the batch, and gradients are averaged. Only the first one (rank 0) measures, writes and prints. A loss that
# looks at a whole batch, such as feature matching, looks at the share of one process.

def setup_ddp(module):
    """Connect the processes, copy rank 0's weights to all of them, and average gradients from here on."""
    if RANKS == 1:
        return
    def average_gradient(weight):
        gradient = weight.grad.contiguous() / RANKS
        dist.all_reduce(gradient)
        weight.grad.copy_(gradient)
    torch.manual_seed(torch.initial_seed() + RANK)  # each process draws crops and noise of its own
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    # rank 0 evaluates while the others wait, hence the long timeout
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=datetime.timedelta(hours=2))
    atexit.register(leave, 1)  # after an error, leave at once; the other processes would wait for this one
    for weight in module.parameters():
        contiguous = weight.detach().contiguous()  # NCCL does not take the channels_last layout
        dist.broadcast(contiguous, 0)
        weight.detach().copy_(contiguous)
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(average_gradient)


def any_rank(flag):
    """Whether the flag is true in any process. Every process has to ask."""
    flag = torch.tensor(int(flag))
    if RANKS > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def leave(status=0):
    """End this process at once. PyTorch's threads sometimes abort one of several processes that ends normally."""
    if RANKS > 1:
        sys.stdout.flush()
        os._exit(status)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------
WARM_UP = 5  # calls in which torch.compile compiles, cuDNN chooses its kernels and optimizers create their state


def cuda_graphed(device, compile, scaler):
    """A decorator for a training step: on a GPU its two thousand small kernels are recorded once and then started
    together, because a CPU needs longer to start them one by one than a large GPU needs to run them. Not with
    --compile=false, with a GradScaler (which looks at the gradients), or with several processes."""
    possible = device.type == "cuda" and compile.lower() != "false" and not scaler.is_enabled() and RANKS == 1
    return CudaGraphed if possible else lambda function: function


class CudaGraphed:
    """A function of tensors, numbers and None that changes weights in place. It is recorded once for each combination
    of shapes and None. Its Python code only runs in the calls before that, so branches and the CPU's random numbers
    stay as they were. It must not ask for the value of a tensor. The next call overwrites what it returns."""
    def __init__(self, function):
        self.function, self.stream, self.recordings = function, torch.cuda.Stream(), {}

    def __call__(self, *inputs):
        shapes = tuple(x.shape if torch.is_tensor(x) else x is None for x in inputs)
        recording = self.recordings.setdefault(shapes, SimpleNamespace(calls=0, graph=None))
        recording.calls += 1
        if recording.calls <= WARM_UP:
            return self.call(inputs)
        if recording.graph is None:
            self.record(recording, inputs)
        for place, x in zip(recording.inputs, inputs):
            if torch.is_tensor(x):
                place.copy_(x)
            elif x is not None:
                place.fill_(x)
        recording.graph.replay()
        return recording.outputs

    def call(self, inputs):
        """Call it on the stream on which it will be recorded, because autograd keeps the stream of each weight."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, recording, inputs):
        """Record the kernels without running them. Numbers become tensors, which later calls fill."""
        number = torch.zeros((), device=inputs[0].device)
        recording.inputs = [x.clone() if torch.is_tensor(x) else x if x is None else number.clone() for x in inputs]
        recording.graph = torch.cuda.CUDAGraph()
        try:  # thread_local: the threads that read images go on pinning memory
            with torch.cuda.graph(recording.graph, stream=self.stream, capture_error_mode="thread_local"):
                recording.outputs = self.function(*recording.inputs)
        except Exception as error:
            cause = error.__context__ or error  # to end a recording that has failed raises an error, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause
            ours = [frame for frame in traceback.extract_tb(cause.__traceback__) if "-packages" not in frame.filename]
            fail(f"{ours[-1].filename}:{ours[-1].lineno}: cannot be recorded as a CUDA graph, in which nothing may ask "
                 f"for a tensor's value ({one_line(cause, 200)}); --compile=false runs it as it is")
        print("machine   a step is recorded as a CUDA graph", flush=True)
