"""Local training on torch: one loop for one process or many. Only the ranks and the simulation import this."""

from ...protocol.kernels import settle

settle()
