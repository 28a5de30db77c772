"""Chooses how many ranks share a sequence, where `sp_size` is "auto"."""

from __future__ import annotations

from mst_ds.planner.cost import step_seconds
from mst_ds.planner.request import Request
from mst_ds.planner.search import choose_settings, preferred_chunk_tokens
from mst_ds.planner.workload import Workload, remembered

# Of the best rate: a prediction knows no smaller difference.
_ABOUT = 0.98


@remembered
def settle_sp_size(request: Request) -> Request:
    """The request with the size of those that fit that is predicted to work through most tokens a second.

    Of about equally fast ones it is the most ranks of a node, which leave most memory, or else the fewest of several
    nodes. So it is where the devices' rates are not known, too; and where nothing fits, the most in a node.
    """
    if not request.other_sp_sizes:
        return request
    fitting = {option.work.sp_size: option for option in request.options() if option.fits()}
    if request.times_are_known:
        rates = {size: _tokens_per_second(option) for size, option in fitting.items()}
        fitting = {size: fitting[size] for size, rate in rates.items() if rate >= _ABOUT * max(rates.values())}
    in_node = request.work.sp_size
    chosen = max((size for size in fitting if size <= in_node), default=min(fitting, default=in_node))
    return fitting.get(chosen) or next(option for option in request.options() if option.work.sp_size == in_node)


def _tokens_per_second(request: Request) -> float:
    """Of all ranks. The slowest counts, so that ranks with unequal memory choose alike."""
    work, zero = _chosen_for(request, request.least_device_memory), request.work.zero
    samples = zero.micro_batch_size * zero.gradient_accumulation_steps * request.topology.dp_size
    return samples * work.seq_len / step_seconds(work, request.rates)


def chosen_work(request: Request) -> Workload:
    """The settings of this rank, for the `sp_size` that the request has."""
    return _chosen_for(request, request.device_memory[request.topology.rank])


@remembered
def _chosen_for(request: Request, device_memory: int) -> Workload:
    return choose_settings(
        request.work,
        request.mst,
        device_memory=device_memory,
        least_device_memory=request.least_device_memory,
        host_memory=request.host_memory,
        gpu=request.rates,
        preferred_chunk_tokens=preferred_chunk_tokens(request.times_are_known),
    )
