"""Names the packages and the extension; everything else stands in setup.cfg."""

import sysconfig

from setuptools import Extension, find_packages, setup

# setup.cfg's `find:` cannot rename, and integrations/ is installed as sparse_comm.integrations.
integrations = find_packages(include=["integrations", "integrations.*"])
# Free-threaded Pythons have no stable interface.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    packages=[
        *find_packages(include=["sparse_comm", "sparse_comm.*"]),
        *(f"sparse_comm.{name}" for name in integrations),
    ],
    ext_modules=[
        Extension(
            "sparse_comm.kernels._native",
            ["sparse_comm/kernels/csrc/native.c"],
            depends=[
                f"sparse_comm/kernels/csrc/{name}.h"
                for name in (
                    *("avx2", "avx512", "blocks", "convert", "jobs", "levels", "nonzeros"),
                    "portable",
                )
            ],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if stable else [],
            # Contracting a * b + c into one rounding would make results depend on the processor.
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=stable,
            optional=True,  # without a compiler the reference in torch does the work
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
)
