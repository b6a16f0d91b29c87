"""For --external_plugins of ms-swift: registers the tuner and the callback `flatlora`."""

import flatlora.integrations.ms_swift  # noqa: F401
