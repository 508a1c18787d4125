"""Packets of a video read ahead of their decoding, so that it is known which picture is shown at a time before any is decoded."""

import bisect
import collections
import math
from collections.abc import Iterator, Sequence

import av

MOST_AHEAD = 64  # packets held at a time; codecs reorder pictures over 16 at most


class PacketsAhead:
    """Iterates over the packets of one stream, in order of decoding; those read ahead are kept until their turn.

    What is known rests on this: no picture is shown before its packet's decoding time, and these rise. In files whose time stamps say otherwise
    nothing is known. All times are in ticks of the stream.
    """

    def __init__(self, packets: Iterator[av.Packet]):
        self._source, self._waiting = packets, collections.deque()
        self._times = []  # presentation times of the packets read, rising
        self._known_until = -math.inf  # packets to come are shown later than this
        self._ordered = True  # time stamps are as they should be, as far as seen
        self._error = None  # what ended the reading

    def __iter__(self) -> Iterator[av.Packet]:
        while self._waiting or self._read():
            yield self._waiting.popleft()
        if self._error:
            raise self._error

    def shown_at(self, time: int) -> int | None:
        """The presentation time of the picture that is shown at `time`; None if that isn't known."""
        while self._known_until <= time and self._ordered and len(self._waiting) < MOST_AHEAD and self._read():
            pass
        place = bisect.bisect_right(self._times, time)
        return self._times[place - 1] if place and self._ordered and self._known_until > time else None

    def may_show(self, packet: av.Packet, times: Sequence[int]) -> bool:
        """Whether the picture in the packet just taken may be the one shown at one of these times (rising)."""
        while self._ordered and packet.size:
            place = bisect.bisect_left(times, packet.pts)
            later = bisect.bisect_right(self._times, packet.pts)
            if place == len(times) or (later < len(self._times) and self._times[later] <= times[place]):
                return False
            if self._known_until > times[place] or len(self._waiting) == MOST_AHEAD or not self._read():
                break
        return True

    def _read(self) -> bool:
        """Takes one packet more from the file. False at its end."""
        try:
            packet = None if self._error else next(self._source, None)
        except av.error.FFmpegError as error:  # told once its turn has come
            self._error, packet = error, None
        if packet is None:
            return False
        self._waiting.append(packet)
        if not packet.size:  # the file's orderly end
            self._known_until = math.inf
        elif packet.pts is None or packet.dts is None or not self._known_until < packet.dts <= packet.pts:
            self._ordered = False
        else:
            self._known_until = packet.dts
            if not packet.is_discard:
                bisect.insort(self._times, packet.pts)
        return True
