"""The instrument that counts waits: the same tests in every folder of the workspace."""

import pytest
import torch
from waits import Host, Waits

X = torch.arange(6.0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: X.sum().item(),
        lambda: bool(X.isfinite().all()),
        lambda: X[X > 2],
        lambda: X.clone().index_put_((X > 2,), torch.tensor(0.0)),
        lambda: X.nonzero(),
        lambda: torch.linalg.inv(torch.eye(3)),
        lambda: X.long().bincount(),
    ],
)
def test_what_reads_the_device_is_seen(wait):
    with Waits() as found:
        wait()
    assert found.places


def test_what_stays_on_the_device_is_not():
    w = X.clone().requires_grad_()
    with Waits() as found:
        y = torch.where(w > 2, w, 0.0).sum() + w[torch.tensor([0, 1])].sum() + w.masked_fill(w > 3, 0.0).sum()
        y.backward()
        torch.optim.AdamW([w], fused=True).step()
    assert not found.places


def test_what_lies_on_the_host_is_read_without_a_wait():
    labels = torch.tensor([0, -100, 2]).as_subclass(Host)
    with Waits() as found:
        kept = (labels >= 0).nonzero()[:, 0]
        assert int(labels[labels > 0].max()) == 2 and isinstance(kept, Host)
        X.sum().item()
    assert len(found.places) == 1
