"""Names the packages; everything else about the distribution stands in setup.cfg."""

from setuptools import find_packages, setup

# setup.cfg's `find:` cannot rename, and integrations/ is installed as sparse_comm.integrations.
integrations = find_packages(include=["integrations", "integrations.*"])
setup(
    packages=[
        *find_packages(include=["sparse_comm", "sparse_comm.*"]),
        *(f"sparse_comm.{name}" for name in integrations),
    ]
)
