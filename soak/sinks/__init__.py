# SPDX-License-Identifier: MIT
"""Real servers behind the dispatcher, faults under load, every event read back."""
