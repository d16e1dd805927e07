"""RSC beside its definition: gradients pair by pair, allocations, what is used again, and the exact end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.training import RSC, allocate, topk_mm
from gossamer.training.sampled import cut, pair_scores, row_norms, sample_rows

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse invariant checks")


def matrix(n: int = 12, m: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """CSR ``[n, m]`` with two empty rows and an empty column."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, m, generator=generator, dtype=dtype)
    dense[torch.rand(n, m, generator=generator) < 0.6] = 0.0
    dense[[1, n - 2]] = 0.0
    dense[:, 3] = 0.0
    return dense.to_sparse_csr()


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(a: Tensor, grad: Tensor, k: int) -> Tensor:
    """The k largest column-row pairs of a.T @ grad, added one by one."""
    dense = a.to_dense()
    scores = [float(dense[i].norm() * grad[i].norm()) for i in range(len(dense))]
    chosen = sorted(range(len(dense)), key=lambda i: (-scores[i], i))[:k]
    found = torch.zeros(a.shape[1], grad.shape[1], dtype=grad.dtype)
    for i in chosen:
        found += dense[i][:, None] * grad[i][None]
    return found


@pytest.mark.parametrize("k", [0, 1, 4, 11, 12])
@pytest.mark.parametrize("size", [(12, 9), (9, 12), (12, 12)])
def test_the_gradient_is_the_sum_of_the_largest_pairs(k: int, size: tuple[int, int]) -> None:
    a, grad = matrix(*size), numbers(size[0], 5, seed=2)
    k = min(k, size[0])
    h = numbers(size[1], 5).requires_grad_()
    out = topk_mm(a, h, k)
    torch.testing.assert_close(out, a.to_dense() @ h)
    out.backward(grad)
    torch.testing.assert_close(h.grad, by_definition(a, grad, k))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_rows_are_the_gradient_that_torch_has(index: torch.dtype, dtype: torch.dtype) -> None:
    a = matrix(dtype=dtype)
    a = torch.sparse_csr_tensor(
        a.crow_indices().to(index), a.col_indices().to(index), a.values(), a.shape, check_invariants=True
    )
    h, twin = (numbers(9, 4, dtype=dtype).requires_grad_() for _ in range(2))
    weights = numbers(12, 4, seed=3, dtype=dtype)
    (topk_mm(a, h, 12) * weights).sum().backward()
    (torch.sparse.mm(a, twin) * weights).sum().backward()
    torch.testing.assert_close(h.grad, twin.grad)


def test_exact_gradients_are_finite_differences() -> None:
    a, weights = matrix(), numbers(12, 3, seed=4)
    assert torch.autograd.gradcheck(lambda h: topk_mm(a, h, 12), (numbers(9, 3).requires_grad_(),))
    values = a.values().clone()

    def loss_of(values: Tensor) -> Tensor:
        one = torch.sparse_csr_tensor(a.crow_indices(), a.col_indices(), values, a.shape)
        return (topk_mm(one, numbers(9, 3), 12).sin() * weights).sum()

    trained = torch.sparse_csr_tensor(a.crow_indices(), a.col_indices(), values.clone(), a.shape).requires_grad_()
    (topk_mm(trained, numbers(9, 3), 12).sin() * weights).sum().backward()
    assert trained.grad is not None
    for entry in range(0, len(values), 5):
        apart = torch.zeros_like(values)
        apart[entry] = 1e-6
        slope = (loss_of(values + apart) - loss_of(values - apart)) / 2e-6
        torch.testing.assert_close(trained.grad.values()[entry], slope, rtol=1e-6, atol=1e-8)


def test_values_have_their_exact_gradient_beside_a_sampled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.training.sampled._ENTRIES", 8)  # in several parts
    a, h = matrix().requires_grad_(), numbers(9, 4).requires_grad_()
    grad = numbers(12, 4, seed=5)
    topk_mm(a, h, 3).backward(grad)
    expected = (grad @ h.detach().T)[a.detach().to_dense() != 0]
    assert a.grad is not None
    torch.testing.assert_close(a.grad.values(), expected)
    torch.testing.assert_close(h.grad, by_definition(a.detach(), grad, 3))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    h = numbers(9, 4).requires_grad_()
    (slope,) = torch.autograd.grad(topk_mm(matrix(), h, 3).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_matrix_that_changed_before_the_backward_pass_is_refused() -> None:
    a, h = matrix(), numbers(9, 4).requires_grad_()
    out = topk_mm(a, h, 3)
    a.values().mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_bad_matrices_and_rows() -> None:
    a, h = matrix(), numbers(9, 4)
    with pytest.raises(ValueError, match="the rows of the sparse matrix; got 13"):
        topk_mm(a, h, 13)
    with pytest.raises(ValueError, match="must be CSR"):
        topk_mm(a.to_dense(), h, 1)
    with pytest.raises(ValueError, match=r"\[9, d\] fits"):
        topk_mm(a, h[:4], 1)


def constructed(seed: int, alike: bool = False, n: int = 50) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Three layers whose scores fall off at different rates; of unequal degrees and widths, or rows that cost alike."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=generator).pow(1 + 4 * layer) / (1 + layer) for layer in range(3)]
    degrees = torch.full((n,), 7) if alike else torch.randint(0, 20, (n,), generator=generator)
    return scores, [degrees] * 3, [16, 16, 16 if alike else 4]


def cost_and_loss(case: Any, kept: list[int]) -> tuple[int, float]:
    cost, lost = 0, 0.0
    for score, count, width, k in zip(*case, kept, strict=True):
        order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
        cost += sum(int(count[i]) * width for i in order[:k])
        lost += sum(float(score[i]) for i in order[k:])
    return cost, lost


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("alike", [False, True])
def test_allocations_hold_the_budget(budget: float, alike: bool) -> None:
    case = constructed(1, alike)
    whole, _ = cost_and_loss(case, [50, 50, 50])
    for how in ("greedy", "uniform"):
        cost, _ = cost_and_loss(case, allocate(*case, budget, how=how))
        assert budget * whole - 3 * 20 * 16 <= cost <= budget * whole


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_allocations_lose_less_where_rows_cost_alike(budget: float, seed: int) -> None:
    case = constructed(seed, alike=True)
    lost, even = (cost_and_loss(case, allocate(*case, budget, how=how))[1] for how in ("greedy", "uniform"))
    assert lost < 0.99 * even


def greedy(case: Any, budget: float, step: int) -> list[int]:
    """The paper's loop, everything computed anew in each turn."""
    kept = [len(score) for score in case[0]]
    whole, _ = cost_and_loss(case, kept)
    while cost_and_loss(case, kept)[0] > budget * whole:
        tried = {}
        for layer, k in enumerate(kept):
            if k:
                fewer = [*kept[:layer], max(0, k - step), *kept[layer + 1 :]]
                tried[layer] = cost_and_loss(case, fewer)[1] - cost_and_loss(case, kept)[1]
        least = min(tried, key=lambda layer: round(tried[layer], 12))
        kept[least] = max(0, kept[least] - step)
    return kept


@pytest.mark.parametrize("budget", [0.07, 0.5])
def test_allocations_are_those_of_the_loop(budget: float) -> None:
    case = constructed(7)
    assert allocate(*case, budget, step=0.1) == greedy(case, budget, 5)


def test_bad_allocations() -> None:
    case = constructed(0)
    with pytest.raises(ValueError, match="shares in"):
        allocate(*case, 0.0)
    with pytest.raises(ValueError, match="shares in"):
        allocate(*case, 0.1, step=2.0)
    with pytest.raises(ValueError, match="'greedy' or 'uniform'"):
        allocate(*case, 0.1, how="even")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got 3, 3, 2"):
        allocate(case[0], case[1], [1, 2], 0.1)
    with pytest.raises(ValueError, match="layer 1 has"):
        allocate([case[0][0], case[0][1][:4], case[0][2]], case[1], case[2], 0.1)


class Spmm(nn.Module):
    """What PyTorch Geometric's GCNConv does with a CSR ``adj_t``: `torch_geometric.utils.spmm` calls torch."""

    def __init__(self, width_in: int, width_out: int, aggr: str = "sum") -> None:
        super().__init__()
        self.weight, self.aggr = nn.Parameter(numbers(width_in, width_out, seed=width_out)), aggr

    def forward(self, x: Tensor, adj_t: Tensor) -> Tensor:
        x = x @ self.weight
        return torch.sparse.mm(adj_t, x) if self.aggr == "sum" else torch.sparse.mm(adj_t, x, self.aggr)


class Network(nn.Module):
    def __init__(self, aggr: str = "sum") -> None:
        super().__init__()
        self.first, self.second = Spmm(6, 8, aggr), Spmm(8, 4, aggr)

    def forward(self, x: Tensor, adj_t: Tensor) -> Tensor:
        return self.second(self.first(x, adj_t).relu(), adj_t)


def gradients(network: Network, a: Tensor, rsc: RSC | None = None) -> list[Tensor]:
    """Of one training step."""
    network.zero_grad()
    if rsc is None:
        network(numbers(12, 6), a).square().sum().backward()
    else:
        with rsc:
            loss = network(numbers(12, 6), a).square().sum()
        loss.backward()
        rsc.step()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("aggr", ["sum", "mean"])
def test_layers_that_call_torch_have_sampled_gradients_inside(aggr: str) -> None:
    network, a, rsc = Network(aggr), matrix(12, 12), RSC(steps=100, budget=0.4)
    exact = gradients(network, a)
    torch.testing.assert_close(gradients(network, a, rsc), exact)  # the first step takes scores
    sampled = gradients(network, a, rsc)
    out = network(numbers(12, 6), a)
    with rsc:
        torch.testing.assert_close(network(numbers(12, 6), a), out)
    assert not torch.allclose(sampled[0], exact[0])
    assert torch.cosine_similarity(sampled[0].flatten(), exact[0].flatten(), dim=0) > 0.5


@pytest.mark.parametrize("product", [torch.mm, torch.matmul, Tensor.__matmul__, torch.sparse.mm])
def test_every_way_to_write_the_product(product: Any) -> None:
    rsc = RSC(steps=10)
    with rsc:
        out = product(matrix(), numbers(9, 4).requires_grad_())
    out.sum().backward()
    assert rsc.rows == [12]
    assert rsc.multiplied == matrix().values().numel() * 4


def test_other_products_are_left_alone() -> None:
    rsc, h = RSC(steps=10), numbers(9, 4).requires_grad_()
    with rsc:
        (matrix().to_dense() @ h).sum().backward()
        torch.sparse.mm(matrix(), h, "amax").sum()
        _ = matrix() @ h[:, 0], matrix() @ h.detach()
        with torch.no_grad():
            _ = matrix() @ h
    assert rsc.rows == []


def test_gradients_between_refreshes_are_those_of_the_allocated_rows() -> None:
    a, rsc = matrix(20, 20, seed=3), RSC(steps=100, budget=0.3)
    h, grad, later = numbers(20, 4).requires_grad_(), numbers(20, 4, seed=6), numbers(20, 4, seed=7)
    for one in (grad, later):
        h.grad = None
        rsc.mm(a, h).backward(one)
        rsc.step()
    scores = pair_scores(row_norms(a), grad)
    (k,) = allocate([scores], [a.crow_indices().diff()], [4], 0.3)
    rows = scores.argsort(descending=True, stable=True)[:k].sort().values
    assert rsc.rows == [k]
    torch.testing.assert_close(h.grad, a.to_dense()[rows].T @ later[rows])


def test_samples_are_used_again_until_the_next_refresh() -> None:
    network, a, rsc = Network(), matrix(12, 12), RSC(steps=1000, budget=0.4, refresh=5)
    samplings, rows = [], []
    for _ in range(11):
        gradients(network, a, rsc)
        samplings.append(rsc.samplings)
        rows.append(rsc.rows)
    assert samplings == [0, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4]  # two layers; steps 0, 5 and 10 are exact
    assert rows[0] == rows[4]
    assert sum(rows[0]) < 24


def test_a_matrix_that_changes_is_cut_anew_to_the_same_rows() -> None:
    a, rsc, h = matrix(12, 12), RSC(steps=1000, budget=0.4, refresh=100), numbers(12, 4).requires_grad_()

    def gradient(one: Tensor) -> Tensor:
        h.grad = None
        rsc.mm(one, h).sum().backward()
        rsc.step()
        assert h.grad is not None
        return h.grad

    gradient(a)
    before = gradient(a).clone()
    torch.testing.assert_close(gradient(matrix(12, 12)), before)  # another tensor of the same values
    a.values().mul_(3.0)
    torch.testing.assert_close(gradient(a), 3 * before)
    assert rsc.samplings == 3


def test_the_last_steps_are_exact() -> None:
    network, a, rsc = Network(), matrix(12, 12), RSC(steps=10, budget=0.2, refresh=4, exact_from=0.8)
    exact, same = gradients(network, a), []
    for _ in range(10):
        found = gradients(network, a, rsc)
        same.append(all(torch.allclose(x, y) for x, y in zip(found, exact, strict=True)))
    assert same == [True, False, False, False, True, False, False, False, True, True]
    assert rsc.rows == [12, 12]
    # Only the second layer's input and the first one's have gradients: both products are counted, of 8 and 4 columns.
    assert rsc.whole == 10 * a.values().numel() * 12
    assert rsc.multiplied < rsc.whole * (4 + 6 * 0.2 + 0.001) / 10


def test_never_exact_where_asked() -> None:
    rsc = RSC(steps=4, exact_from=1.0)
    for _ in range(4):
        assert not rsc.exact
        rsc.step()


def test_gradients_of_zero_have_scores_of_zero() -> None:
    rsc, h = RSC(steps=10), numbers(9, 4).requires_grad_()
    rsc.mm(matrix(), h).backward(torch.zeros(12, 4, dtype=torch.float64))
    rsc.step()
    rsc.mm(matrix(), h).backward(numbers(12, 4))
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())


def test_a_forward_pass_with_other_products_is_refused() -> None:
    rsc, h = RSC(steps=10), numbers(9, 4).requires_grad_()
    rsc.mm(matrix(), h).sum().backward()
    rsc.step()
    with pytest.raises(ValueError, match="product 0 of the forward pass is"):
        rsc.mm(matrix(8), h)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"refresh": 0}, {"exact_from": 1.5}, {"budget": 0.0}, {"shrink": 0.0}])
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        RSC(**{"steps": 10, **bad})


def test_empty_matrices_have_gradients_of_zero() -> None:
    empty = torch.zeros(5, 9, dtype=torch.float64).to_sparse_csr()
    h = numbers(9, 4).requires_grad_()
    topk_mm(empty, h, 5).sum().backward()
    assert h.grad is not None
    assert not h.grad.any()
    assert sample_rows(matrix(), torch.tensor([1])).transposed.shape == (9, 1)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_cut_from_a_transposed_matrix_are_those_of_the_matrix(index: torch.dtype) -> None:
    a = matrix()
    a = torch.sparse_csr_tensor(a.crow_indices().to(index), a.col_indices().to(index), a.values(), a.shape)
    for chosen in ([], [0, 1, 4, 11], list(range(12))):
        rows = torch.tensor(chosen, dtype=torch.int64)
        found, expected = cut(sample_rows(a), rows).transposed, sample_rows(a, rows).transposed
        assert found.shape == (9, len(chosen))
        assert found.crow_indices().dtype == found.col_indices().dtype == index
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.to_dense(), a.to_dense()[rows].T)


def test_a_matrix_is_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import gossamer.training.rsc as module

    calls: list[int] = []

    def counted(a: Tensor, rows: Tensor | None = None) -> Any:
        calls.append(0 if rows is None else len(rows))
        return sample_rows(a, rows)

    monkeypatch.setattr(module, "sample_rows", counted)
    network, a, rsc = Network(), matrix(12, 12), RSC(steps=30, budget=0.4, refresh=5)
    for _ in range(30):
        gradients(network, a, rsc)
    assert calls == [0]


def test_layers_of_pytorch_geometric() -> None:
    nn_of = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    first, second = nn_of.GCNConv(6, 8), nn_of.SAGEConv(8, 4)
    a, x = (matrix(12, 12).to_dense() != 0).float().to_sparse_csr(), numbers(12, 6, dtype=torch.float32)
    rsc = RSC(steps=100, budget=0.3)
    for _ in range(2):
        with rsc:
            loss = second(first(x, a).relu(), a).square().sum()
        loss.backward()
        rsc.step()
    assert len(rsc.rows) == 2
    assert rsc.multiplied < 0.8 * rsc.whole
