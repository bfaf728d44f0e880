"""`python -m fedlq_ray.cli`."""

from fedlq_ray.cli.main import main

if __name__ == "__main__":
    main()
