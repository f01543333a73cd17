"""Device times of a launch, from CUDA graphs of many."""

import statistics

import cupy as cp
import torch

REPEATS, LAUNCHES = 9, 10
"""Times that a graph is launched, and launches in it."""


def graph_us(launch) -> float:
    """Median device time of one launch, in microseconds; `launch(i)` is given its number."""
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        for i in range(LAUNCHES):
            launch(i)
        stream.synchronize()
        stream.begin_capture()
        for i in range(LAUNCHES):
            launch(i)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        times = []
        for _ in range(REPEATS):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def torch_us(launch) -> float:
    """The same for PyTorch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(LAUNCHES):
            launch(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(LAUNCHES):
                launch(i)
        graph.replay()
        stream.synchronize()
        times = []
        for _ in range(REPEATS):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)
