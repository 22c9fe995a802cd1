"""One page of a run or a bench, from the files in its folder; and its pictures."""
