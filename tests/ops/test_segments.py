"""The index tensors as the GPU backends see them: order, checks on the host, clamps and ``valid`` on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_kernels import checks, segments


def prepare(
    x: Tensor, cu_seqlens: object = None, sample_ids: object = None, group_ids: object = None, **counts: int | None
) -> segments.Segments:
    values = (cu_seqlens, sample_ids, group_ids)
    tensors = [torch.tensor(v, dtype=torch.int64) if isinstance(v, list) else v for v in values]
    dy = x.new_empty(*x.shape[:-1], 2)
    return segments.device_segments(checks.fused_grad_norm(x, dy, *tensors, **counts, backends=("torch",)))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every value as one on a GPU, which is not read."""
    monkeypatch.setattr(segments, "_on_host", lambda device: False)


def rows_of(found: segments.Segments) -> list[tuple[int, int, int, int]]:
    columns = (found.start, found.end, found.sample, found.group)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("device_values", [False, True])
def test_order_is_group_then_sample_then_row(
    dtype: torch.dtype, device_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_values:
        monkeypatch.setattr(segments, "_on_host", lambda device: False)
    x = torch.zeros(1000 + 777 + 1 + 13, 3)
    offsets = torch.tensor([0, 1, 1, 778, 791, 1791], dtype=dtype)
    found = prepare(x, offsets, torch.tensor([2, 0, 1, 2, 0], dtype=dtype), torch.tensor([1, 0, 0], dtype=dtype))
    assert rows_of(found) == [(1, 778, 1, 0), (0, 1, 2, 0), (778, 791, 2, 0), (1, 1, 0, 1), (791, 1791, 0, 1)]
    assert (found.samples, found.groups) == (3, 2)
    assert [t.dtype for t in (found.start, found.end, found.sample, found.group)] == [torch.int64] * 2 + [
        torch.int32
    ] * 2
    assert found.valid is None if not device_values else bool(found.valid)


def test_samples_and_groups_without_segments() -> None:
    found = prepare(torch.zeros(7, 3), [0, 7], [4], [0, 0, 0, 0, 2, 1], num_groups=5)
    assert (found.samples, found.groups) == (6, 5)
    assert rows_of(found) == [(0, 7, 4, 2)]


def test_without_index_tensors() -> None:
    assert rows_of(prepare(torch.zeros(5, 3))) == [(0, 5, 0, 0)]
    assert rows_of(prepare(torch.zeros(0, 3))) == [(0, 0, 0, 0)]
    assert rows_of(prepare(torch.zeros(2, 7, 3))) == [(0, 7, 0, 0), (7, 14, 1, 0)]
    assert rows_of(prepare(torch.zeros(0, 7, 3))) == []
    found = prepare(torch.zeros(0, 3), [0])
    assert (found.samples, found.groups, rows_of(found)) == (0, 1, [])


def test_each_alone_is_in_the_order_of_the_samples() -> None:
    found = prepare(torch.zeros(9, 3), [0, 2, 3, 9], [1, 0, 1], [0, 0]).each_alone()
    assert rows_of(found) == [(2, 3, 0, 0), (0, 2, 1, 1), (3, 9, 1, 1)]
    assert found.groups == 2


@pytest.mark.parametrize(
    ("offsets", "samples", "groups", "said"),
    [
        ([1, 5, 9], None, None, "cu_seqlens must start at 0"),
        ([0, 5, 8], None, None, "cu_seqlens must end at the number of rows"),
        ([0, 10, 9], None, None, "cu_seqlens must ascend"),
        ([0, 5, 9], [0, -1], None, "sample_ids must be at least 0"),
        ([0, 5, 9], [0, 2], [0, 0], "sample_ids must be below"),
        ([0, 5, 9], None, [0, -7], "group_ids must be at least 0"),
    ],
)
def test_wrong_values_raise_on_the_host_and_void_the_results_on_a_device(
    offsets: list[int], samples: list[int], groups: list[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(9, 3)
    with pytest.raises(ValueError, match=said):
        prepare(x, offsets, samples, groups)
    monkeypatch.setattr(segments, "_on_host", lambda device: False)
    found = prepare(x, offsets, samples, groups)
    assert found.valid is not None and not bool(found.valid)
    assert bool(((found.start >= 0) & (found.start <= found.end) & (found.end <= 9)).all())
    assert bool(((found.sample >= 0) & (found.sample < found.samples)).all())
    assert bool(((found.group >= 0) & (found.group < found.groups)).all())
    assert found.guard(torch.ones(3)).isnan().all()
    assert found.guard_weight_grad(torch.ones(3, 2)).isnan().tolist() == [[True] * 2, [False] * 2, [False] * 2]
    assert found.guard_weight_grad(torch.ones(0, 2)).shape == (0, 2)
    assert found.guard(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("counts", [{"num_samples": 0}, {"num_groups": 0}])
def test_ids_of_nothing_leave_no_segments(counts: dict[str, int]) -> None:
    samples = counts.get("num_samples", 2)
    found = prepare(torch.zeros(9, 3), [0, 5, 9], [0, 1], [0] * samples, **counts)
    assert rows_of(found) == []
    assert found.valid is not None and not bool(found.valid)


@pytest.mark.usefixtures("unread")
def test_counts_that_only_values_tell() -> None:
    found = prepare(torch.zeros(9, 3), [0, 5, 9], [0, 777])
    assert (found.samples, bool(found.valid)) == (778, True)


def test_rows_keeps_views_where_strides_leave_one() -> None:
    packed = torch.randn(13, 8)
    for view in (packed, packed[::2], packed[:, 1:5], packed[:1].expand(777, 8), torch.randn(3, 5, 8)):
        found = segments.rows(view)
        assert found.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        assert torch.equal(found, view.reshape(-1, view.shape[-1]))
    for awkward in (packed.T, packed[:, ::2], packed[:, :1].expand(13, 7), torch.randn(3, 5, 8)[:, :4]):
        found = segments.rows(awkward)
        assert found.stride(1) == 1
        assert torch.equal(found, awkward.reshape(-1, awkward.shape[-1]))


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("count", range(1, 8))
def test_everything_begins_at_a_multiple_of_16_bytes(where: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory shows where in an allocation the copies from the host begin."""
    x = torch.zeros(count, 3, device="meta" if where == "host" else "cpu")
    if where == "device":
        monkeypatch.setattr(segments, "_on_host", lambda device: False)
    offsets = torch.arange(count + 1)
    for ids in (None, torch.arange(count).flip(0)):
        found = prepare(x, offsets, ids, num_samples=None if ids is None else count)
        for tensor in (found.start, found.end, found.sample, found.group):
            assert tensor.device == x.device and len(tensor) == count and tensor.is_contiguous()
            assert tensor.storage_offset() * tensor.itemsize % 16 == 0


@pytest.mark.parametrize("sizes", [[1, 2, 3, 5, 0, 777], [4, 8], [0], []])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_vectors_share_an_allocation_and_nothing_else(sizes: list[int], dtype: torch.dtype) -> None:
    found = segments.vectors(sizes, dtype, torch.device("cpu"))
    assert [len(vector) for vector in found] == sizes and all(vector.dtype == dtype for vector in found)
    assert all(vector.data_ptr() % 16 == 0 for vector in found)
    assert len({vector.untyped_storage().data_ptr() for vector in found}) <= 1
    for value, vector in enumerate(found):
        vector.fill_(value)
    assert all((vector == value).all() for value, vector in enumerate(found))


class _Copies(torch.overrides.TorchFunctionMode):
    """Notes every ``Tensor.to`` that leaves the CPU: whether it waits, and what was read."""

    def __init__(self) -> None:
        self.found: list[tuple[bool, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is Tensor.to and args[0].device.type == "cpu" != result.device.type:
            self.found.append((not (kwargs or {}).get("non_blocking", False), args[0].untyped_storage().data_ptr()))
        return result


@pytest.mark.parametrize("on_device", ["offsets", "ids", "none"])
def test_copies_from_the_host_do_not_wait_and_read_memory_of_their_own(on_device: str) -> None:
    """The caller may overwrite its (pinned) tensors as soon as it has the results."""
    x = torch.zeros(9, 3, device="meta")
    offsets, ids = torch.tensor([0, 2, 5, 9]), torch.tensor([1, 0, 1], dtype=torch.int32)
    groups = torch.tensor([0, 1], dtype=torch.int32)
    given = {tensor.untyped_storage().data_ptr() for tensor in (offsets, ids, groups)}
    values = (
        offsets.to("meta") if on_device == "offsets" else offsets,
        ids.to("meta") if on_device == "ids" else ids,
        groups,
    )
    with _Copies() as copies:
        prepare(x, *values, num_samples=2, num_groups=2)
    assert len(copies.found) == (1 if on_device == "none" else 2)
    assert not any(waits for waits, _ in copies.found)
    assert not {read for _, read in copies.found} & given


def test_row_numbers_are_int64() -> None:
    """Batches of more than 2^31 elements are a matter of row times width: rows are numbered in int64."""
    cu_seqlens, samples = torch.tensor([0, 2, 5, 9], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32)
    x = torch.randn(9, 2)
    batch = checks.grad_gram(x, x, cu_seqlens, samples, None, "auto", "auto", backends=())
    found = segments.host_segments(batch)
    assert found.order is not None and found.order.dtype == torch.int64
    assert found.order.tolist() == [0, 1, 5, 6, 7, 8, 2, 3, 4]
