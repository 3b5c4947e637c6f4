"""CUDA graphs: a training step's two thousand small kernels, recorded once and then started together. Started one by
one, they cost the CPU more time than a large GPU needs to run them.
"""
import traceback

import torch
from tqdm import tqdm  # comes with diffusers

from support.configure import stop
from support.parallel import RANKS

WARM_UP = 5  # calls in which torch.compile compiles, cuDNN chooses its kernels and optimizers make their states


def replayed(device, compile, scaler):
    """A decorator: the function's kernels are replayed from a CUDA graph where that is possible: not with
    --compile=false, nor where a GradScaler looks at the gradients, nor where processes exchange them. Without Triton
    nothing is compiled, but it is recorded."""
    possible = device.type == "cuda" and compile.lower() != "false" and not scaler.is_enabled() and RANKS == 1
    return Replayed if possible else lambda function: function


class Replayed:
    """A function of tensors and numbers that changes weights in place. Its Python runs in the first calls only, for
    each shape of its arguments: numbers, branches and random numbers of the CPU stay what they were in the last of
    these. It may not ask for a tensor's value. What it returns is overwritten by the next call: clone what you keep.
    """
    def __init__(self, function):
        self.function, self.stream = function, torch.cuda.Stream()
        self.shapes, self.calls, self.graph, self.inputs, self.outputs = None, 0, None, None, None

    def __call__(self, *inputs):
        shapes = [x.shape if torch.is_tensor(x) else () for x in inputs]
        if shapes != self.shapes:  # at first there are no old fakes; D may begin later
            self.shapes, self.calls, self.graph, self.inputs, self.outputs = shapes, 0, None, None, None
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.call(inputs)
        if self.graph is None:
            self.record(inputs)
        for place, x in zip(self.inputs, inputs):
            place.copy_(x) if torch.is_tensor(x) else place.fill_(x)
        self.graph.replay()
        return self.outputs

    def call(self, inputs):
        """On the stream on which it will be recorded, so that what autograd keeps of the weights belongs to it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, inputs):
        """Computes nothing yet. Threads that read images go on pinning memory meanwhile."""
        self.inputs = [x.clone() if torch.is_tensor(x) else torch.zeros((), device=inputs[0].device) for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except Exception as error:
            cause = error.__context__ or error  # ending a recording that failed fails, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause
            ours = [at for at in traceback.extract_tb(cause.__traceback__) if "site-packages" not in at.filename]
            stop(f"{ours[-1].filename}:{ours[-1].lineno}: cannot be recorded as a CUDA graph, in which nothing may ask "
                 f"for a tensor's value ({' '.join(str(cause).split())[:200]}); --compile=false runs it as it is")
        tqdm.write("machine   a step is recorded as a CUDA graph: from here on its Python does not run")
