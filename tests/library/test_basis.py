"""HOSVD by Grams against the stacked reference, and what a basis promises."""

import sys

import pytest
import torch
from engine_checks import basis_of, unfolded_svd
from torch import Tensor

from sparsegrad import Basis, UserError, hosvd
from sparsegrad.basis import load_bases, save_bases
from sparsegrad.calibration.eigh import large_eigenvectors
from sparsegrad.calibration.grams import Grams


def gradients(out: int = 14, features: int = 9, count: int = 5, seed: int = 0) -> list[Tensor]:
    """Gradients with well-separated energies, float64."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64)).Q
    U = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    scale = torch.outer(0.7 ** torch.arange(out), 0.6 ** torch.arange(features)).double()
    noise = torch.randn(count, out, features, generator=generator, dtype=torch.float64)
    return list(V @ (scale * noise) @ U.T)


def distance(one: Tensor, other: Tensor) -> float:
    """Largest distance between the subspaces that the leading columns span, over all their numbers."""
    size = one.shape[0]
    gaps = [one[:, :n] @ one[:, :n].T - other[:, :n] @ other[:, :n].T for n in range(1, size + 1)]
    return max(float(gap.abs().max()) for gap in gaps)


def orthogonality(matrix: Tensor) -> float:
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("reference", ["svd", "tensorly"])
def test_grams_and_stacked_tensor_give_the_same_subspaces(reference: str) -> None:
    if reference == "tensorly":
        pytest.importorskip("tensorly")
    gram = hosvd(gradients())
    stacked = unfolded_svd(gradients()) if reference == "svd" else hosvd(gradients(), method="stacked")
    # Gram matrices square the singular values: the last directions hold 1e-10 of the energy.
    assert distance(gram.out_basis, stacked.out_basis) < 1e-6
    assert distance(gram.in_basis, stacked.in_basis) < 1e-6


@pytest.mark.parametrize("method", ["gram", "stacked"])
def test_bases_are_orthogonal(method: str) -> None:
    if method == "stacked":
        pytest.importorskip("tensorly")
    basis = hosvd(gradients(), method=method)
    assert orthogonality(basis.in_basis) < 1e-10
    assert orthogonality(basis.out_basis) < 1e-10


def test_fewer_gradients_than_dimensions_still_give_an_orthogonal_basis() -> None:
    basis = hosvd([torch.outer(torch.arange(6.0), torch.arange(4.0)).double()])
    assert orthogonality(basis.out_basis) < 1e-10
    assert orthogonality(basis.in_basis) < 1e-10


def test_a_large_side_is_decomposed_with_less_memory_to_the_same_subspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = hosvd(gradients())
    monkeypatch.setattr("sparsegrad.calibration.grams.is_large", lambda size, _: size > 10)
    large = hosvd(gradients())
    assert distance(large.out_basis, usual.out_basis) < 1e-6
    assert torch.equal(large.in_basis, usual.in_basis)  # 9 features: not large
    assert orthogonality(large.out_basis) < 1e-10


@pytest.mark.parametrize("solver", ["scipy", "torch"])
def test_the_large_solver_works_in_place_and_without_scipy_too(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = half @ half.T  # of rank 7: most eigenvalues are one cluster
    given = gram.clone()
    if solver == "scipy":
        pytest.importorskip("scipy")
    else:
        monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    vectors = large_eigenvectors(given)
    if solver == "scipy":
        assert not torch.equal(given, gram)  # no copy was made
    assert orthogonality(vectors) < 1e-10
    rotated = vectors.T @ gram @ vectors
    assert torch.allclose(rotated, torch.diag(rotated.diag()), atol=1e-9)
    assert (rotated.diag().diff() > -1e-9).all()
    assert torch.allclose(rotated.diag(), torch.linalg.eigvalsh(gram), atol=1e-9)


def test_large_sums_are_used_up_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegrad.calibration.grams.is_large", lambda size, _: size > 10)
    grams = Grams()
    for G in gradients():
        grams.add(G)
    basis = grams.basis()
    assert (grams.out_gram, grams.in_gram) == (None, None)
    with pytest.raises(UserError, match="at least one gradient"):
        grams.basis()
    for G in gradients():
        grams.add(G)
    assert torch.equal(grams.basis().in_basis, basis.in_basis)


def test_energy_falls_along_both_sides() -> None:
    stack = torch.stack([hosvd(gradients()).rotate(G) for G in gradients()])
    for energy in (stack.square().sum((0, 2)), stack.square().sum((0, 1))):
        assert (energy.diff() <= 1e-12).all()


def test_the_transposed_in_basis_concentrates_less() -> None:
    """The authors' code rotates by U^T: the reason that this project has both as methods."""
    basis = hosvd(gradients())
    authors = Basis(basis.in_basis.T, basis.out_basis)

    def top_share(chosen: Basis) -> float:
        rotated = torch.stack([chosen.rotate(G) for G in gradients()]).square().flatten(1)
        return float((rotated.topk(5).values.sum(1) / rotated.sum(1)).mean())

    assert top_share(basis) > 1.2 * top_share(authors)


def test_rotation_keeps_the_norm_and_comes_back() -> None:
    G, basis = gradients()[0], hosvd(gradients())
    assert torch.allclose(basis.rotate(G).norm(), G.norm(), atol=1e-12)
    assert torch.allclose(basis.unrotate(basis.rotate(G)), G, atol=1e-12)


@pytest.mark.parametrize("kept", [3, 64])  # few, and so many that the product itself is dense
@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (8, 8)])
def test_sparse_unrotation_equals_the_dense_one(shape: tuple[int, int], kept: int) -> None:
    basis = hosvd(gradients(*shape))
    index = torch.randperm(shape[0] * shape[1])[:kept]
    values = torch.randn(kept, dtype=torch.float64)
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float64).index_put((index,), values).view(shape)
    assert torch.allclose(
        basis.unrotate_sparse(index[None], values[None], dense.shape)[0], basis.unrotate(dense), atol=1e-12
    )


def test_a_basis_from_a_file_is_read_by_columns_and_stays_the_same(tmp_path) -> None:
    basis = hosvd(gradients())
    basis.save(tmp_path / "basis.safetensors")
    loaded = Basis.load(tmp_path / "basis.safetensors").by_columns()
    for mine, theirs in ((loaded.in_basis, basis.in_basis), (loaded.out_basis, basis.out_basis)):
        assert mine.T.is_contiguous()
        assert torch.equal(mine, theirs)
        assert mine.T.contiguous().data_ptr() == mine.data_ptr()  # done once, it is free


def test_the_decomposition_leaves_the_sums_as_they_are() -> None:
    grams = Grams()
    for gradient in gradients():
        grams.add(gradient)
    before, first = grams.in_gram.clone(), grams.basis()
    assert torch.equal(grams.in_gram, before)
    assert torch.equal(grams.basis().in_basis, first.in_basis)


def test_float32_gradients_give_a_float32_basis_close_to_float64s() -> None:
    basis = hosvd(G.float() for G in gradients())
    assert basis.in_basis.dtype == torch.float32
    assert orthogonality(basis.out_basis) < 1e-5
    assert abs(float(basis.out_basis[:, 0].double() @ hosvd(gradients()).out_basis[:, 0])) > 1 - 1e-5


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    assert hosvd(G.bfloat16() for G in gradients()).in_basis.dtype == torch.float32


def test_save_and_load_are_exact(tmp_path) -> None:
    basis = hosvd(gradients())
    basis.save(tmp_path / "one.safetensors", fingerprint="abc")
    loaded = Basis.load(tmp_path / "one.safetensors")
    assert torch.equal(loaded.in_basis, basis.in_basis)
    assert torch.equal(loaded.out_basis, basis.out_basis)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_bases_of_another_fingerprint_are_refused(tmp_path) -> None:
    path = tmp_path / "kinds.safetensors"
    save_bases(path, {"up": hosvd(gradients()), "down": hosvd(gradients(9, 14))}, "abc")
    assert list(load_bases(path, "abc")) == ["up", "down"]
    with pytest.raises(UserError, match="fingerprint abc, not xyz"):
        load_bases(path, "xyz")
    with pytest.raises(UserError, match="holds the bases of up, down"):
        Basis.load(path)


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "basis.safetensors"
    hosvd(gradients()).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-8], b"\x80\x04pickle", b"{" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable basis file"):
            Basis.load(path)
    with pytest.raises(UserError, match="no basis file"):
        Basis.load(tmp_path / "missing")
    with pytest.raises(UserError, match=r"cannot read .*nothing was deleted"):
        Basis.load(tmp_path / ("x" * 300))  # exists or not: the system does not open it


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="no gradients"):
        hosvd([])
    with pytest.raises(UserError, match="no gradients"):
        hosvd([], method="stacked")
    with pytest.raises(UserError, match=r"\(3, 4\) and \(4, 3\)"):
        hosvd([torch.zeros(4, 3), torch.zeros(3, 4)])
    with pytest.raises(UserError, match="not finite"):
        hosvd([torch.full((3, 3), float("nan"))])
    with pytest.raises(UserError, match="method=magic"):
        hosvd(gradients(), method="magic")
    with pytest.raises(UserError, match="square"):
        Basis(torch.zeros(3, 4), torch.eye(3))
    with pytest.raises(UserError, match=r"\(9, 14\) does not fit a basis for \(14, 9\)"):
        hosvd(gradients()).rotate(torch.zeros(9, 14))


def test_grams_keep_no_gradient() -> None:
    """O(d^2) memory: what is stored does not grow with the number of gradients."""
    grams = Grams()
    for gradient in gradients(count=50):
        grams.add(gradient)
    assert grams.out_gram is not None
    assert grams.in_gram is not None
    assert (grams.count, grams.out_gram.numel(), grams.in_gram.numel()) == (50, 14 * 14, 9 * 9)


def test_kinds_may_share_one_tensor_and_a_file_keeps_both(tmp_path) -> None:
    shared = basis_of(6, 6).in_basis
    assert shared is not None
    bases = {"up": Basis(shared, shared), "down": Basis(shared[:4, :4], None)}
    save_bases(tmp_path / "bases", bases)
    found = load_bases(tmp_path / "bases")
    for kind, basis in bases.items():
        assert torch.equal(found[kind].in_basis, basis.in_basis)
    assert torch.equal(found["up"].out_basis, shared)
