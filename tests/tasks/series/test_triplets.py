"""Windows of the triplet loss, and the loss."""

import pytest
import torch

from flowformer.tasks.series.triplets import cut, draw_windows, triplet_loss


def ends(windows):
    return windows.start + windows.length


@pytest.mark.parametrize("equal", [False, True])
def test_windows_lie_where_they_should(equal):
    torch.manual_seed(0)
    lengths = torch.full((400,), 9) if equal else torch.tensor([1, 5, 9, 9]).repeat(100)
    others = torch.full((800,), 9) if equal else torch.tensor([3, 8]).repeat(400)
    anchors, positives, negatives = [], [], []
    for _ in range(60 if equal else 1):
        anchor, positive, negative = draw_windows(lengths, others, equal=equal)
        for windows, most in ((anchor, lengths), (positive, lengths), (negative, others)):
            assert bool((windows.start >= 0).all() and (windows.length >= 1).all() and (ends(windows) <= most).all())
        assert bool((positive.start >= anchor.start).all() and (ends(positive) <= ends(anchor)).all())
        if equal:
            assert [len(set(one.length.tolist())) for one in (anchor, positive, negative)] == [1, 1, 1]
            assert positive.length[0] == negative.length[0]
        anchors.append(anchor), positives.append(positive), negatives.append(negative)
    # Every length occurs, and starts of all kinds.
    assert {int(n) for one in positives for n in one.length} == set(range(1, 10))
    assert {int(n) for one in negatives for n in one.length} == set(range(1, 10 if equal else 9))
    assert {int(n) for one in anchors for n in one.start} >= set(range(5))
    assert {int(n) for one in negatives for n in one.start} >= set(range(5))


def test_cut_pads_on_the_right():
    x = torch.arange(12.0).view(2, 6, 1)
    _, positive, _ = draw_windows(torch.tensor([1]), torch.tensor([1]), equal=False)
    windows = positive._replace(start=torch.tensor([4, 0, 1]), length=torch.tensor([2, 3, 1]))
    parts, mask = cut(x, torch.tensor([1, 0, 1]), windows)
    assert [part[real, 0].tolist() for part, real in zip(parts, mask, strict=True)] == [[10, 11], [0, 1, 2], [7]]


def test_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    anchor, positive, negatives = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 4, 3)
    wanted = 0.0
    for row in range(4):
        wanted -= torch.sigmoid(anchor[row] @ positive[row]).log() / 4
        for other in range(2):
            wanted -= torch.sigmoid(-anchor[row] @ negatives[other, row]).log() / 4 / 2
    torch.testing.assert_close(triplet_loss(anchor, positive, negatives), wanted)
