# cmake -DCOMPILER=c++ -DINCLUDE=dir -DSOURCE=file.cpp -DEXPECT=text [-DSTANDARD=20] -P check.cmake
#
# SOURCE holds one mistake, mended where FIXED is defined. As it is it must be refused, with a
# message that has EXPECT in it; mended it must compile, so that nothing but the mistake is the
# reason. The file for old standards is mended by a newer one instead.
if(NOT DEFINED STANDARD)
  set(STANDARD 20)
endif()

function(compile standard result output)
  execute_process(
    COMMAND ${COMPILER} -std=c++${standard} -fsyntax-only -I${INCLUDE} ${ARGN} ${SOURCE}
    RESULT_VARIABLE code
    OUTPUT_VARIABLE out
    ERROR_VARIABLE err)
  set(${result} "${code}" PARENT_SCOPE)
  set(${output} "${out}${err}" PARENT_SCOPE)
endfunction()

compile(20 fixed message -DFIXED)
if(NOT fixed EQUAL 0)
  message(FATAL_ERROR "does not compile with its mistake mended:\n${message}")
endif()

compile(${STANDARD} broken message)
if(broken EQUAL 0)
  message(FATAL_ERROR "compiles, mistake and all")
endif()
string(FIND "${message}" "${EXPECT}" at)
if(at EQUAL -1)
  message(FATAL_ERROR "refused without a word about ${EXPECT}:\n${message}")
endif()
