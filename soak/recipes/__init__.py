# SPDX-License-Identifier: MIT
"""What users copy: each file stands alone, needs tempo and what it imports, and is tested on the real thing."""
