// What today's C++ library has and older ones lack, compiled in: so that a library which is built here runs wherever torch
// does (setup.py names the systems).
#include <new>
#include <sstream>

#ifdef __GLIBCXX__

// libstdc++ has some of their members from 3.4.26 and 3.4.29.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

namespace clipsteer {

// From 3.4.29: what an allocator throws when asked for more than there can be.
[[noreturn]] __attribute__((visibility("hidden"))) void throw_bad_array_new_length() asm(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// glibc has it from 2.32: whether counters may do without atomic steps. Here they never do.
extern __attribute__((visibility("hidden"))) char single_threaded asm("__libc_single_threaded");
char single_threaded = 0;

}  // namespace clipsteer
#endif
