"""Machine instructions of hot kernels and calls: a guard against slowing down that needs no clock."""
