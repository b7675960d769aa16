"""Each test begins with an accelerate that knows of no earlier one."""

from trainers import fresh_accelerate as fresh_accelerate
