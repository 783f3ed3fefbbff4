"""The Pareto front, by hand."""

from mikv.metrics.pareto import pareto_front


def test_a_point_is_on_the_front_where_no_smaller_one_is_as_good() -> None:
    sizes, values = [100.0, 20.0, 50.0, 30.0, 60.0], [1.0, 0.2, 0.7, 0.2, 0.6]
    assert pareto_front(sizes, values) == [1, 2, 0]
    assert pareto_front(sizes, [-v for v in values], lower_is_better=True) == [1, 2, 0]


def test_of_points_of_equal_size_the_better_one() -> None:
    assert pareto_front([20.0, 20.0, 20.0], [0.1, 0.5, 0.5]) == [1]
    assert pareto_front([], []) == []
