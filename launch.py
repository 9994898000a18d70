"""Compress a network: `python launch.py problem=lenet5_mnist evolution.sparsity=0.99`; see the README.

A thin shell of `de_ray/launch.py`, which wheels carry.
"""

from de_ray.launch import main

if __name__ == "__main__":
    main()
