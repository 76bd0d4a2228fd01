"""A stand-in for CuPy that runs nothing: it writes down each call and the device it was made on."""

from types import SimpleNamespace


class FakeCuPy:
    """`calls` lists (device, name, *arguments); streams and events are known by number alone."""

    def __init__(self):
        self.device = 0
        self.calls = []
        self.capturing = set()
        self.finished = set()
        self.current_streams = {0: 100, 1: 101}
        self.device_of_pointer = {}
        fake = self

        class Device:
            def __init__(self, device=None):
                self.entered = fake.device if device is None else device

            def __enter__(self):
                self.left, fake.device = fake.device, self.entered

            def __exit__(self, *_):
                fake.device = self.left

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing
                self.ptr = 1 + sum(name == "eventCreate" for _, name, *_ in fake.calls)
                fake.log("eventCreate", self.ptr)

            @property
            def done(self):
                return self.ptr in fake.finished

        def stream_is_capturing(stream):
            fake.log("streamIsCapturing", stream)
            return stream in fake.capturing

        def malloc_async(num_bytes, stream):
            fake.log("mallocAsync", num_bytes, stream)
            return 0xA000

        self.cuda = SimpleNamespace(
            Device=Device,
            Event=Event,
            get_current_stream=lambda device: SimpleNamespace(ptr=fake.current_streams[device]),
            runtime=SimpleNamespace(
                eventRecord=lambda event, stream: fake.log("eventRecord", event, stream),
                streamWaitEvent=lambda stream, event: fake.log("streamWaitEvent", stream, event),
                streamIsCapturing=stream_is_capturing,
                mallocAsync=malloc_async,
                freeAsync=lambda pointer, stream: fake.log("freeAsync", pointer, stream),
                memsetAsync=lambda pointer, value, num_bytes, stream: fake.log(
                    "memsetAsync", pointer, value, num_bytes, stream
                ),
                pointerGetAttributes=lambda pointer: SimpleNamespace(
                    device=fake.device_of_pointer[pointer]
                ),
            ),
        )

    def log(self, name, *arguments):
        self.calls.append((self.device, name, *arguments))

    def take(self):
        """The calls since the last time, without questions."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call[1] != "streamIsCapturing"]
