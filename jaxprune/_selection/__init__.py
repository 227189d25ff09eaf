"""Exact counts, order statistics and moments of arrays, without a sort and without a gather. Private."""
